import { expect, test } from "vitest";
import type { Schemas } from "$/api/client";
import { stateOf, withLine, written, type Line, type Step } from "./steps";

type Build = Schemas["BuildBody"];

function read(...lines: Partial<Line>[]): Step[] {
  const whole = lines.map((each, at) => ({
    number: at + 1,
    time: at,
    level: "info" as const,
    message: "",
    step: 1,
    phase: "build",
    elapsed_ms: 0,
    ...each,
  }));
  return whole.reduce<Step[]>(withLine, []);
}

function states(steps: Step[], build: Partial<Build>): string[] {
  const whole = { error: null, finished_at: null, state: "building", ...build } as Build;
  return steps.map((each, at) => stateOf(each, whole, at === steps.length - 1));
}

const LINES: Partial<Line>[] = [
  { step: 0, message: "a note" },
  { step: 1, message: "RUN one (cached)" },
  { step: 2, message: "RUN two" },
  { step: 2, message: "done in 9 s" },
  { step: 2, message: "done in 1.5 s", level: "debug" },
  { step: 3, message: "RUN echo (cached)" },
];

test("steps have the time that the builder tells, not the one that a command tells", () => {
  const steps = read(...LINES);
  expect(steps.map((each) => [each.number, each.line, each.took])).toEqual([
    [1, 2, null],
    [2, 3, 1.5],
    [3, 6, null],
  ]);
  expect(states(steps, {})).toEqual(["cached", "done", "running"]);
  expect(steps.map((each) => written(each, "cached")).at(0)).toBe("RUN one");
});

test("what ended before its end failed or was cancelled", () => {
  const steps = read(...LINES.slice(0, 3));
  const error = { code: "build_failed", message: "no", hint: "", step: 2 };
  expect(states(steps, { state: "failed", finished_at: 9, error })).toEqual(["cached", "failed"]);
  expect(states(steps, { state: "cancelled", finished_at: 9 })).toEqual(["cached", "cancelled"]);
  expect(states(steps, { state: "ready", finished_at: 9 })).toEqual(["cached", "done"]);
});

test("a build that was interrupted does its steps again", () => {
  const steps = read(...LINES, { step: 1, message: "RUN one" }, { step: 2, message: "RUN two" });
  expect(steps.map((each) => [each.number, each.line])).toEqual([
    [1, 7],
    [2, 8],
  ]);
});
