import { expect, test } from "vitest";
import { spans, toCsv, total } from "./days";

const DAYS = [
  { day: "2026-02-27", cpu_minutes: 1.5, ram_mb_minutes: 256 },
  { day: "2026-02-28", cpu_minutes: 0, ram_mb_minutes: 0 },
];

test("months go backwards, over the turn of the year, to their last day", () => {
  const found = spans(new Date("2026-02-10T00:00:00Z"));
  expect(found[0]).toEqual({ value: "", text: "Last 30 days" });
  expect(found[1]).toMatchObject({ value: "2026-02", from: "2026-02-01", to: "2026-02-28" });
  expect(found[3]).toMatchObject({ value: "2025-12", from: "2025-12-01", to: "2025-12-31" });
  expect(found).toHaveLength(13);
});

test("days are added up and written down", () => {
  expect(total(DAYS)).toEqual({ cpu: 1.5, memory: 256 });
  expect(total([])).toEqual({ cpu: 0, memory: 0 });
  expect(toCsv(DAYS)).toBe(
    "day,cpu_minutes,ram_mib_minutes\r\n2026-02-27,1.5,256\r\n2026-02-28,0,0\r\n",
  );
});
