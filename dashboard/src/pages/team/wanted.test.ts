import { expect, test } from "vitest";
import { readWanted, wantedEvents } from "./wanted";

test("what a form shows of a channel is what it says again", () => {
  for (const events of [["*"], ["sandbox.*"], ["member.*", "sandbox.paused", "host.down"]]) {
    expect(wantedEvents(readWanted(events))).toEqual(events);
  }
});

test("kinds may be typed in any way, and count once", () => {
  const typed = { all: false, families: ["build.*"], others: " sandbox.paused,\nbuild.*  a.b\n" };
  expect(wantedEvents(typed)).toEqual(["build.*", "sandbox.paused", "a.b"]);
  expect(wantedEvents({ all: false, families: [], others: " \n" })).toEqual([]);
});
