/** The sandbox that a page is about, kept as it is; its tabs find it here. */
import { createContext, untrack } from "svelte";
import { ApiError, answer, api, type Schemas } from "$/api/client";
import type { Events } from "$/api/events";
import type { Sandbox } from "$/lib/sandboxes.svelte";

export type Happening = Schemas["EventBody"];

/** As many events as the API answers with at once. */
const BATCH = 200;

export class Current {
  readonly id: string;
  value = $state.raw<Sandbox | null>(null);
  error = $state.raw<ApiError | null>(null);
  /** What happened to it, oldest first. */
  timeline = $state.raw<Happening[]>([]);

  /** What is to be done when the page is left, be it for another sandbox's. */
  readonly leaving = new Set<() => void>();

  constructor(id: string) {
    this.id = id;
  }

  /** There is something to ask inside of it. */
  get running(): boolean {
    return this.value?.status === "running" || this.value?.status === "snapshotting";
  }

  /** Reads it and follows its events. Returns what ends that. */
  follow(events: Events): () => void {
    const end = events.listen(({ sandbox_id }) => {
      if (sandbox_id === this.id) void this.load();
    });
    // Whoever follows it in an effect does not begin anew with each thing that is read.
    untrack(() => void this.load());
    return () => {
      end();
      for (const each of this.leaving) each();
    };
  }

  load = async (): Promise<void> => {
    const at = { params: { path: { sandbox_id: this.id } } };
    try {
      const [value, news] = await Promise.all([
        answer(api.GET("/v1/sandboxes/{sandbox_id}", at)),
        this.#news(),
      ]);
      this.put(value);
      const known = this.timeline.at(-1)?.id ?? 0;
      this.timeline = [...this.timeline, ...news.filter((each) => each.id > known)];
      this.error = null;
    } catch (thrown) {
      this.error = ApiError.of(thrown);
    }
  };

  /** What was told since the last that is known. */
  async #news(): Promise<Happening[]> {
    const news: Happening[] = [];
    for (;;) {
      const after = (news.at(-1) ?? this.timeline.at(-1))?.id ?? 0;
      const batch = await answer(
        api.GET("/v1/sandboxes/{sandbox_id}/timeline", {
          params: { path: { sandbox_id: this.id }, query: { after } },
        }),
      );
      news.push(...batch);
      if (batch.length < BATCH) return news;
    }
  }

  put(sandbox: Sandbox): void {
    if (!this.value || this.value.last_updated <= sandbox.last_updated) this.value = sandbox;
  }
}

/** Of the page of one sandbox: `const current = getCurrent()`. */
export const [getCurrent, setCurrent] = createContext<Current>();
