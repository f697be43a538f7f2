/** The checkpoints of the sandboxes of a family, each list read when it is first wanted. */
import { SvelteMap } from "svelte/reactivity";
import { ApiError, answer, api, type Schemas } from "$/api/client";
import type { Events } from "$/api/events";

export type Checkpoint = Schemas["CheckpointBody"];

/** Asked for at once, at most. */
const AT_ONCE = 4;
/** After which the list is another. */
const KINDS = new Set(["checkpoint.created", "sandbox.rolled_back"]);

interface Known {
  /** Oldest first; undefined until it is read. */
  value?: Checkpoint[];
  error?: ApiError;
}

export class Checkpoints {
  #known = new SvelteMap<string, Known>();
  #waiting: string[] = [];
  #asking = 0;

  of(id: string): Known {
    return this.#known.get(id) ?? {};
  }

  /** Reads them, unless that was done. */
  want(ids: string[]): void {
    const news = ids.filter((id) => !this.#known.has(id));
    for (const id of news) this.#known.set(id, {});
    this.#waiting.push(...news);
    while (this.#asking < AT_ONCE && this.#waiting.length) void this.#work();
  }

  /** Reads those again that events tell of. Returns what ends that. */
  follow(events: Events): () => void {
    return events.listen(({ kind, sandbox_id }) => {
      if (sandbox_id && KINDS.has(kind) && this.#known.has(sandbox_id)) void this.load(sandbox_id);
    });
  }

  load = async (id: string): Promise<void> => {
    try {
      const value = await answer(
        api.GET("/v1/sandboxes/{sandbox_id}/checkpoints", { params: { path: { sandbox_id: id } } }),
      );
      this.#known.set(id, { value: value.sort((a, b) => a.created_at - b.created_at) });
    } catch (thrown) {
      this.#known.set(id, { ...this.#known.get(id), error: ApiError.of(thrown) });
    }
  };

  async #work(): Promise<void> {
    this.#asking += 1;
    for (let id = this.#waiting.shift(); id; id = this.#waiting.shift()) await this.load(id);
    this.#asking -= 1;
  }
}
