/**
 * Text that others wrote. Nothing of it is ever markup here; but characters that are not seen can
 * make one name look like another, or turn the line around. They are shown by their numbers.
 *
 * Controls are C0, DEL and C1; the others are those of bidirectional text and of no width, in
 * Unicode's category Cf (UAX #9, "Explicit Directional Formatting Characters"), and line separators.
 */
const UNSEEN =
  /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]/gu;

export interface Piece {
  text: string;
  /** It stands for a character that would not be seen. */
  unseen: boolean;
}

/** The text in pieces, with what is not seen made visible: `⟨U+202E⟩`. */
export function pieces(text: string): Piece[] {
  const found: Piece[] = [];
  let at = 0;
  for (const match of text.matchAll(UNSEEN)) {
    if (match.index > at) found.push({ text: text.slice(at, match.index), unseen: false });
    found.push({ text: numbered(match[0]), unseen: true });
    at = match.index + match[0].length;
  }
  if (at < text.length) found.push({ text: text.slice(at), unseen: false });
  return found;
}

/** The same as one text, for titles and labels. */
export function visible(text: string): string {
  return text.replace(UNSEEN, numbered);
}

function numbered(character: string): string {
  const number = (character.codePointAt(0) ?? 0).toString(16).toUpperCase().padStart(4, "0");
  return `⟨U+${number}⟩`;
}
