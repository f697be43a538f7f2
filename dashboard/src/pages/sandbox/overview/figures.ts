/** What a sandbox used, as charts take it. */
import type { Schemas } from "$/api/client";

export type Point = Schemas["PointBody"];
export type Range = "10m" | "2h" | "24h";

/** How much time a range shows, and how soon the next point of it can be there. */
export const RANGES: Record<Range, { text: string; length: number; pause: number }> = {
  "10m": { text: "10 minutes", length: 600, pause: 5 },
  "2h": { text: "2 hours", length: 7200, pause: 30 },
  "24h": { text: "24 hours", length: 86_400, pause: 300 },
};

/** Times in seconds, and a value for each; null where there is none. */
export interface Series {
  times: number[];
  values: (number | null)[];
}

/**
 * One value of each point, the last of a second; nothing is drawn across a time in which it did
 * not run, that is more than `gap` seconds without a point.
 */
export function series(points: Point[], value: (point: Point) => number, gap: number): Series {
  const found: Series = { times: [], values: [] };
  for (const point of points) {
    const before = found.times.at(-1);
    if (before !== undefined && point.timestamp <= before) {
      found.values[found.values.length - 1] = value(point);
      continue;
    }
    if (before !== undefined && point.timestamp - before > gap) {
      found.times.push(before + gap);
      found.values.push(null);
    }
    found.times.push(point.timestamp);
    found.values.push(value(point));
  }
  return found;
}

/** The newest and the highest value; null where there is none. */
export function summary({ values }: Series): { latest: number; highest: number } | null {
  const there = values.filter((each) => each !== null);
  const latest = there.at(-1);
  if (latest === undefined) return null;
  return { latest, highest: there.reduce((one, other) => Math.max(one, other)) };
}
