/** Lists that the API gives by pages, as one. */

interface Page<T> {
  items: T[];
  /** The `cursor` of the page after it; empty at the end. */
  next: string;
}

/** The most that the API gives at once. */
export const LARGEST_PAGE = 1000;

/** All items of all pages; `ask` gets the page that a cursor names. */
export async function everything<T>(ask: (cursor: string) => Promise<Page<T>>): Promise<T[]> {
  const found: T[] = [];
  let cursor = "";
  do {
    const page = await ask(cursor);
    found.push(...page.items);
    cursor = page.next;
  } while (cursor);
  return found;
}
