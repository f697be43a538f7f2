/** Figures as people read them. */

const KIB = 1024;
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** A size, in units of 1024: `1.5 GiB`. */
export function bytes(count: number): string {
  let unit = 0;
  while (count >= KIB && unit < UNITS.length - 1) {
    count /= KIB;
    unit += 1;
  }
  const digits = unit === 0 || count >= 100 ? 0 : 1;
  return `${count.toFixed(digits).replace(/\.0$/, "")} ${UNITS[unit]}`;
}

/** A size that is given in MiB. */
export function mebibytes(count: number): string {
  return bytes(count * KIB * KIB);
}

/** A length of time: `85 ms`, `4.2 s`, `3 min 5 s`, `2 h 10 min`, `5 d`. */
export function duration(seconds: number): string {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0).replace(/\.0$/, "")} s`;
  const whole = Math.round(seconds);
  if (whole < 3600) return two(Math.floor(whole / 60), "min", whole % 60, "s");
  const minutes = Math.floor(whole / 60);
  if (minutes < 24 * 60) return two(Math.floor(minutes / 60), "h", minutes % 60, "min");
  const hours = Math.floor(minutes / 60);
  return two(Math.floor(hours / 24), "d", hours % 24, "h");
}

function two(large: number, unit: string, small: number, smallUnit: string): string {
  return small ? `${large} ${unit} ${small} ${smallUnit}` : `${large} ${unit}`;
}

/** How long ago a time was, in seconds since the epoch: `just now`, `5 min ago`. */
export function ago(at: number, now: number): string {
  const seconds = now - at;
  if (seconds < 5) return "just now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86_400) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86_400)} d ago`;
}

const LOCAL = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

/** A time, in seconds since the epoch, where the reader is. */
export function local(at: number): string {
  return LOCAL.format(at * 1000);
}

/** The same in UTC: `2026-11-29 17:43:27 UTC`. */
export function utc(at: number): string {
  return `${new Date(at * 1000).toISOString().slice(0, 19).replace("T", " ")} UTC`;
}

/** `1 sandbox`, `2 sandboxes`. */
export function count(number: number, one: string, many = `${one}s`): string {
  return `${number.toLocaleString()} ${number === 1 ? one : many}`;
}

/** How many of a list are shown: `2 sandboxes`, or `2 of 9`. */
export function someOf(some: number, all: number, one: string, many?: string): string {
  return some === all ? count(all, one, many) : `${some} of ${all}`;
}
