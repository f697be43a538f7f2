/** Which events a channel wants, as a form has it and as the API has it. */

export const FAMILIES = [
  { pattern: "sandbox.*", text: "Sandboxes" },
  { pattern: "build.*", text: "Builds" },
  { pattern: "template.*", text: "Templates" },
  { pattern: "member.*", text: "Members" },
] as const;

export interface Wanted {
  all: boolean;
  /** Patterns of `FAMILIES`. */
  families: string[];
  /** Other kinds, as they are typed: one a line, or with spaces or commas between. */
  others: string;
}

/** What a form shows of a channel's events. */
export function readWanted(events: readonly string[]): Wanted {
  const patterns: string[] = FAMILIES.map((each) => each.pattern);
  return {
    all: events.includes("*"),
    families: events.filter((each) => patterns.includes(each)),
    others: events.filter((each) => each !== "*" && !patterns.includes(each)).join("\n"),
  };
}

/** What a form says, for the API; empty when nothing is chosen. */
export function wantedEvents(wanted: Wanted): string[] {
  if (wanted.all) return ["*"];
  const typed = wanted.others.split(/[\s,]+/).filter(Boolean);
  return [...new Set([...wanted.families, ...typed])];
}
