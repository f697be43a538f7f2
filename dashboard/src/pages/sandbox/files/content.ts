/** What a file's content is, told by its bytes alone: its name may say anything. */

export type Content =
  { kind: "picture"; type: string } | { kind: "text"; text: string } | { kind: "binary" };

/** Pictures that are pixels and nothing else; an SVG is a document, and shown as its text. */
const PICTURES: [type: string, start: (number | null)[]][] = [
  ["image/png", [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a]],
  ["image/jpeg", [0xff, 0xd8, 0xff]],
  ["image/gif", [0x47, 0x49, 0x46, 0x38, null, 0x61]],
  ["image/webp", [0x52, 0x49, 0x46, 0x46, null, null, null, null, 0x57, 0x45, 0x42, 0x50]],
];

/** The media type of a picture, by how it begins; empty for all else. */
export function pictureType(bytes: Uint8Array): string {
  const found = PICTURES.find(([, start]) =>
    start.every((byte, at) => (byte === null ? at < bytes.length : bytes[at] === byte)),
  );
  return found?.[0] ?? "";
}

/** Tells what bytes are; of those that are not `whole` the last character may be cut. */
export function tell(bytes: Uint8Array, whole: boolean): Content {
  const type = pictureType(bytes);
  if (type) return { kind: "picture", type };
  if (bytes.includes(0)) return { kind: "binary" };
  try {
    const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
    return { kind: "text", text: decoder.decode(bytes, { stream: !whole }) };
  } catch {
    return { kind: "binary" };
  }
}

const PER_LINE = 16;

/** Bytes as lines of their place, their numbers, and the letters that they are. */
export function dump(bytes: Uint8Array): string {
  const lines = [];
  for (let at = 0; at < bytes.length; at += PER_LINE) {
    const some = [...bytes.subarray(at, at + PER_LINE)];
    const numbers = some.map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
    const letters = some.map((byte) =>
      byte > 0x1f && byte < 0x7f ? String.fromCharCode(byte) : ".",
    );
    const place = at.toString(16).padStart(6, "0");
    lines.push(`${place}  ${numbers.padEnd(3 * PER_LINE - 1)}  ${letters.join("")}`);
  }
  return lines.join("\n");
}
