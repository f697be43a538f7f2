/**
 * The team's sandboxes, kept as they are: read once, and each again when an event tells of it.
 */
import { SvelteMap } from "svelte/reactivity";
import { ApiError, answer, api, type Schemas } from "../api/client";
import type { Events } from "../api/events";
import { everything } from "./everything";

export type Sandbox = Schemas["SandboxBody"];

const PAGE = 500;
/** Asked for at once, at most. */
const AT_ONCE = 6;
const GATHER_MS = 60;
/** Of the API, which does not list those that are over unless it is asked for them. */
const OVER = "stopped";
/** All but that one. */
export const STATES = [
  "pending",
  "starting",
  "running",
  "pausing",
  "paused",
  "resuming",
  "snapshotting",
  "stopping",
  "missing",
  "error",
] as const;

export class Sandboxes {
  error = $state.raw<ApiError | null>(null);
  /** All were read at least once. */
  loaded = $state(false);
  #found = new SvelteMap<string, Sandbox>();
  #told = new Set<string>();
  #timer: ReturnType<typeof setTimeout> | undefined;
  #asking = 0;

  /** Newest first. */
  all = $derived.by(() => [...this.#found.values()].sort((a, b) => b.created_at - a.created_at));

  get(id: string): Sandbox | undefined {
    return this.#found.get(id);
  }

  /** Reads all and follows the events. Returns what ends that. */
  follow(events: Events): () => void {
    const end = events.listen(({ sandbox_id }) => {
      if (!sandbox_id) return;
      this.#told.add(sandbox_id);
      this.#timer ??= setTimeout(() => void this.#read(), GATHER_MS);
    });
    void this.load();
    return () => {
      end();
      clearTimeout(this.#timer);
    };
  }

  load = async (): Promise<void> => {
    try {
      const items = await everything((cursor) =>
        answer(
          api.GET("/v1/sandboxes", {
            params: { query: { state: [...STATES], limit: PAGE, cursor } },
          }),
        ),
      );
      const seen = new Set(items.map((each) => each.id));
      items.forEach((each) => this.put(each));
      for (const id of [...this.#found.keys()]) if (!seen.has(id)) this.#found.delete(id);
      this.loaded = true;
      this.error = null;
    } catch (thrown) {
      this.error = ApiError.of(thrown);
    }
  };

  /** What an answer says of a sandbox; an older one than what is known says nothing. */
  put(sandbox: Sandbox): void {
    const known = this.#found.get(sandbox.id);
    if (known && known.last_updated > sandbox.last_updated) return;
    if (sandbox.status === OVER) this.#found.delete(sandbox.id);
    else this.#found.set(sandbox.id, sandbox);
  }

  async #read(): Promise<void> {
    this.#timer = undefined;
    const waiting = [...this.#told];
    this.#told.clear();
    const workers = Array.from({ length: Math.max(0, AT_ONCE - this.#asking) }, async () => {
      this.#asking += 1;
      for (let id = waiting.pop(); id; id = waiting.pop()) await this.#readOne(id);
      this.#asking -= 1;
    });
    await Promise.all(workers);
    // None was free: whoever is done with theirs takes these.
    for (const id of waiting) this.#told.add(id);
    if (this.#told.size) this.#timer ??= setTimeout(() => void this.#read(), GATHER_MS);
  }

  async #readOne(id: string): Promise<void> {
    try {
      this.put(
        await answer(
          api.GET("/v1/sandboxes/{sandbox_id}", { params: { path: { sandbox_id: id } } }),
        ),
      );
    } catch (thrown) {
      const error = ApiError.of(thrown);
      if (error.status === 404) this.#found.delete(id);
      else this.error = error;
    }
  }
}
