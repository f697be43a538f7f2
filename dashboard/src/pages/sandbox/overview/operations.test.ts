import { expect, test } from "vitest";
import type { Happening } from "../current.svelte";
import { operations, phaseTitle } from "./operations";

let next = 1;

function event(kind: string, data: Happening["data"], at = next): Happening {
  return { id: next++, kind, sandbox_id: "sb1", at, data };
}

test("what begins and ends is one, newest first", () => {
  const phases = [{ name: "slot", ms: 3 }];
  const found = operations([
    event("sandbox.starting", { state: "starting", host: "rock", template: "base" }, 10),
    event("sandbox.moved", { state: "starting", host: "cliff", reason: "no room" }, 11),
    event("sandbox.running", { state: "running", phases }, 12.5),
    event("sandbox.pausing", { state: "pausing" }, 20),
  ]);
  expect(found.map(({ title, seconds, ongoing }) => [title, seconds, ongoing])).toEqual([
    ["Pause", null, true],
    ["Create", 2.5, false],
  ]);
  expect(found[1]?.phases).toBe(phases);
  expect(found[1]?.causes).toEqual([
    "from template base",
    "on host rock",
    "moved to host cliff",
    "no room",
  ]);
});

test("what fails is called by what it was to be", () => {
  const [failed] = operations([
    event("sandbox.pausing", { state: "pausing" }),
    event("sandbox.running", { state: "running", error: "the disk is full" }),
  ]);
  expect(failed).toMatchObject({ title: "Pause", failed: true, causes: ["the disk is full"] });
});

test("a destroy takes the sandbox from what was being done", () => {
  const found = operations([
    event("sandbox.pausing", { state: "pausing" }),
    event("sandbox.stopping", { state: "stopping" }),
    event("sandbox.stopped", { state: "stopped" }),
  ]);
  expect(found.map(({ title, ongoing }) => [title, ongoing])).toEqual([
    ["Destroy", false],
    ["Pause", false],
  ]);
});

test("one event can be all there is", () => {
  const found = operations([
    event("sandbox.paused", { state: "paused", seen: true }),
    event("sandbox.timeout_changed", { state: "paused", timeout_s: 90 }),
    event("sandbox.network_changed", { state: "paused", allow_internet_access: false, rules: 1 }),
  ]);
  expect(found.map(({ title, causes }) => [title, ...causes])).toEqual([
    ["Network policy changed", "to no Internet, with 1 rule"],
    ["Idle limit changed", "to 1 min 30 s"],
    ["Paused by its host", "after its idle limit"],
  ]);
});

test("a newer host's phases have their names", () => {
  expect(phaseTitle("slot")).toBe("Network slot taken");
  expect(phaseTitle("thaw")).toBe("thaw");
});
