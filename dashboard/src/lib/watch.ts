/** Asking again and again, where no event tells of changes, as long as the page is seen. */
import { on } from "svelte/events";

/**
 * Calls `ask` now, every `seconds`, and when the page is seen again. Returns what ends that.
 * While an answer is awaited nothing more is asked.
 */
export function watch(ask: () => Promise<unknown>, seconds: number): () => void {
  let asking = false;
  async function once(): Promise<void> {
    if (asking || document.hidden) return;
    asking = true;
    await ask();
    asking = false;
  }
  const timer = setInterval(once, seconds * 1000);
  const end = on(document, "visibilitychange", once);
  void once();
  return () => {
    clearInterval(timer);
    end();
  };
}
