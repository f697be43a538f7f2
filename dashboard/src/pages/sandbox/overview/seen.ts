/** What is asked for again and again, as long as somebody can see it. */
import { on } from "svelte/events";

/** Does `work` now, and again `pause` milliseconds after each end, but not while the page is hidden. */
export function whileSeen(work: () => Promise<void>, pause: number): () => void {
  let timer: ReturnType<typeof setTimeout> | undefined;
  let busy = false;
  let over = false;

  async function go(): Promise<void> {
    clearTimeout(timer);
    if (busy || over || document.hidden) return;
    busy = true;
    try {
      await work();
    } finally {
      busy = false;
      if (!over && !document.hidden) timer = setTimeout(() => void go(), pause);
    }
  }

  void go();
  const end = on(document, "visibilitychange", () => void go());
  return () => {
    over = true;
    clearTimeout(timer);
    end();
  };
}
