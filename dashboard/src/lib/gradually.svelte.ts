/** A long list that is shown piece by piece, so that no single piece of work keeps the page busy. */

const PIECE = 20;

/**
 * How many of `length` are to be shown: some at once, and more with each frame. To be called while
 * a component is made.
 *
 *     const count = gradually(() => all.length);
 *     {#each all.slice(0, count()) as each (each.id)}
 */
export function gradually(length: () => number): () => number {
  let limit = $state(PIECE);
  $effect(() => {
    if (limit >= length()) return;
    const frame = requestAnimationFrame(() => (limit += PIECE));
    return () => cancelAnimationFrame(frame);
  });
  return () => limit;
}
