import { expect, test } from "vitest";
import { ago, bytes, count, duration, someOf, utc } from "./format";

test("sizes are in units of 1024", () => {
  expect([0, 1023, 1024, 1536, 5 * 1024 ** 3].map(bytes)).toEqual([
    "0 B",
    "1023 B",
    "1 KiB",
    "1.5 KiB",
    "5 GiB",
  ]);
});

test("lengths of time have the two units that matter", () => {
  const shown = [0.0849, 4.2, 59, 60, 185, 7800, 5 * 86_400, 90_000].map(duration);
  expect(shown).toEqual([
    "85 ms",
    "4.2 s",
    "59 s",
    "1 min",
    "3 min 5 s",
    "2 h 10 min",
    "5 d",
    "1 d 1 h",
  ]);
});

test("how long ago a time was", () => {
  expect([1, 30, 90, 7200, 200_000].map((each) => ago(0, each))).toEqual([
    "just now",
    "30 s ago",
    "1 min ago",
    "2 h ago",
    "2 d ago",
  ]);
  expect(utc(0)).toBe("1970-01-01 00:00:00 UTC");
});

test("counts agree with their noun", () => {
  expect([count(1, "fork"), count(2, "fork")]).toEqual(["1 fork", "2 forks"]);
  expect([someOf(2, 2, "box", "boxes"), someOf(2, 9, "box", "boxes")]).toEqual([
    "2 boxes",
    "2 of 9",
  ]);
});
