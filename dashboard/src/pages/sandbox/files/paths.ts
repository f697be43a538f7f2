/** Paths of a sandbox's files: absolute, with `/` between names that may be anything else. */

/** The last name of a path; of the root `/`. */
export function nameOf(path: string): string {
  return names(path).at(-1) ?? "/";
}

/** The directory above. */
export function above(path: string): string {
  return `/${names(path).slice(0, -1).join("/")}`;
}

/** A path below a directory. */
export function below(directory: string, ...more: string[]): string {
  return `/${[...names(directory), ...more.flatMap(names)].join("/")}`;
}

export interface Crumb {
  name: string;
  path: string;
}

/** The way to a path, from the root. */
export function crumbs(path: string): Crumb[] {
  const all = names(path);
  return [
    { name: "/", path: "/" },
    ...all.map((name, at) => ({ name, path: `/${all.slice(0, at + 1).join("/")}` })),
  ];
}

/** Why a name or a path that somebody typed will not do; empty when it does. */
export function fault(typed: string): string {
  const all = names(typed);
  if (!all.some((each) => each.trim())) return "It is empty";
  if (all.includes("..") || all.includes(".")) return "It has a part that is . or ..";
  if (all.some((each) => new TextEncoder().encode(each).length > MAX_NAME_BYTES)) {
    return `A name has at most ${MAX_NAME_BYTES} bytes`;
  }
  return "";
}

/** Of Linux. */
const MAX_NAME_BYTES = 255;

function names(path: string): string[] {
  return path.split("/").filter((each) => each);
}
