/** `name=value` lines, as people type them. */

export interface Pairs {
  pairs: Record<string, string>;
  /** What is wrong with them; empty for nothing. */
  error: string;
}

/** Reads lines of `name=value`; empty ones are skipped. */
export function parsePairs(text: string): Pairs {
  const pairs: Record<string, string> = Object.create(null) as Record<string, string>;
  for (const [at, line] of text.split("\n").entries()) {
    if (!line.trim()) continue;
    const equals = line.indexOf("=");
    const name = line.slice(0, equals).trim();
    if (equals < 0 || !name) return { pairs: {}, error: `Line ${at + 1} is not name=value` };
    pairs[name] = line.slice(equals + 1);
  }
  return { pairs: { ...pairs }, error: "" };
}
