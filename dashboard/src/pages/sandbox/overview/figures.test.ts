import { expect, test } from "vitest";
import { series, summary, type Point } from "./figures";

const point = (timestamp: number, cpu_pct: number): Point => ({
  timestamp,
  cpu_pct,
  mem_bytes: 0,
  disk_bytes: 0,
});
const cpu = (each: Point): number => each.cpu_pct;

test("of a second the last value counts", () => {
  const found = series([point(1, 5), point(1, 7), point(2, 3)], cpu, 10);
  expect(found).toEqual({ times: [1, 2], values: [7, 3] });
});

test("a time without points is a gap", () => {
  const found = series([point(1, 5), point(100, 7)], cpu, 10);
  expect(found).toEqual({ times: [1, 11, 100], values: [5, null, 7] });
  expect(summary(found)).toEqual({ latest: 7, highest: 7 });
});

test("nothing has no summary", () => {
  expect(summary(series([], cpu, 10))).toBeNull();
});
