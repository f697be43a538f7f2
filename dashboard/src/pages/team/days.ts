/** Daily usage: months to choose from, sums, and a file for spreadsheets. */
import type { Schemas } from "$/api/client";

export type Day = Schemas["DayBody"];

/** Days from and to which usage is asked for; of the last thirty days neither is said. */
export interface Span {
  value: string;
  text: string;
  from?: string;
  to?: string;
}

const MONTHS = 12;
const NAMED = new Intl.DateTimeFormat(undefined, {
  month: "long",
  year: "numeric",
  timeZone: "UTC",
});

/** The last thirty days, and months backwards from a time, as UTC has them. */
export function spans(now: Date): Span[] {
  const found: Span[] = [{ value: "", text: "Last 30 days" }];
  for (let back = 0; back < MONTHS; back += 1) {
    const first = new Date(Date.UTC(now.getUTCFullYear(), now.getUTCMonth() - back, 1));
    const last = new Date(Date.UTC(first.getUTCFullYear(), first.getUTCMonth() + 1, 0));
    const from = isoDay(first);
    found.push({ value: from.slice(0, 7), text: NAMED.format(first), from, to: isoDay(last) });
  }
  return found;
}

const isoDay = (date: Date): string => date.toISOString().slice(0, 10);

/** All of some days together. */
export function total(days: readonly Day[]): { cpu: number; memory: number } {
  return {
    cpu: days.reduce((sum, day) => sum + day.cpu_minutes, 0),
    memory: days.reduce((sum, day) => sum + day.ram_mb_minutes, 0),
  };
}

/** Some days as comma separated values (RFC 4180). */
export function toCsv(days: readonly Day[]): string {
  const rows = days.map((day) => [day.day, day.cpu_minutes, day.ram_mb_minutes].join(","));
  return ["day,cpu_minutes,ram_mib_minutes", ...rows, ""].join("\r\n");
}
