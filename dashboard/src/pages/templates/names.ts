/** Names of templates: `app:v1`, or `app` for its tag `default`. */

const DEFAULT_TAG = "default";

/** The name before the tag, and the tag. */
export function splitName(name: string): { base: string; tag: string } {
  const colon = name.indexOf(":");
  if (colon < 0) return { base: name, tag: DEFAULT_TAG };
  return { base: name.slice(0, colon), tag: name.slice(colon + 1) };
}

/** The shortest way to say `base:tag`. */
export function tagged(base: string, tag: string): string {
  return tag === DEFAULT_TAG ? base : `${base}:${tag}`;
}
