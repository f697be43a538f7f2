/** Invitations, as people paste them. */

/** The token in a link, or what was pasted if it is none. */
export function tokenOf(pasted: string): string {
  const text = pasted.trim();
  return /[#&?]invitation=([^&\s]+)/.exec(text)?.[1] ?? text;
}
