/**
 * Asking again and again, for what no event of the team's tells of. While the page is hidden
 * nothing is asked.
 */

/** Does `work` now, and again so long after it is done. Returns what ends that. */
export function repeat(work: () => Promise<unknown>, everyMs: number): () => void {
  let timer: ReturnType<typeof setTimeout> | undefined;
  let ended = false;
  let busy = false;

  async function turn(): Promise<void> {
    clearTimeout(timer);
    if (ended || busy || document.hidden) return;
    busy = true;
    try {
      await work();
    } finally {
      busy = false;
    }
    if (!ended) timer = setTimeout(() => void turn(), everyMs);
  }

  const look = (): void => void turn();
  document.addEventListener("visibilitychange", look);
  // Not within an effect that calls this: it would depend on what `work` reads.
  timer = setTimeout(look, 0);
  return () => {
    ended = true;
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", look);
  };
}
