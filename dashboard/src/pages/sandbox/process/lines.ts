/** What programs print, as plain text. */
import { visible } from "$/lib/foreign";

// Colours and movements of a terminal (ECMA-48, "control sequences"), which a page has no use for.
const SEQUENCES = /\u001b\[[0-?]*[ -/]*[@-~]/g;

/** The text, its lines and tabs kept; all else that is not seen is made visible. */
export function plain(text: string): string {
  return text
    .replace(SEQUENCES, "")
    .replace(/\r+\n/g, "\n")
    .split(/([\n\t])/)
    .map((piece) => (piece === "\n" || piece === "\t" ? piece : visible(piece)))
    .join("");
}

/** The end of a text, from the beginning of a line, at most so long. */
export function tail(text: string, most: number): string {
  if (text.length <= most) return text;
  const cut = text.length - most;
  const line = text.indexOf("\n", cut);
  return text.slice(line < 0 ? cut : line + 1);
}
