/** What is read again when events tell of a change. */
import { session } from "$/lib/session.svelte";

/**
 * Does something a moment after events whose kind begins with `wanted`, once for those of that
 * moment. Returns what ends that.
 */
export function afterEvents(wanted: string, work: () => unknown, waitMs: number): () => void {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const end = session.events.listen(({ kind }) => {
    if (!kind.startsWith(wanted)) return;
    timer ??= setTimeout(() => {
      timer = undefined;
      work();
    }, waitMs);
  });
  return () => {
    end();
    clearTimeout(timer);
  };
}
