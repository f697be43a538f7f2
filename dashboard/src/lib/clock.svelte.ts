/** The present time, for what shows how long ago something was. */
import { createSubscriber } from "svelte/reactivity";

const STEP_MS = 5000;

const subscribe = createSubscriber((update) => {
  const timer = setInterval(update, STEP_MS);
  return () => clearInterval(timer);
});

/** Seconds since the epoch; what reads it is shown anew every few seconds. */
export function now(): number {
  subscribe();
  return Date.now() / 1000;
}
