/** The team's builds, newest first: a page at a time, and each again when an event tells of it. */
import { SvelteMap } from "svelte/reactivity";
import { ApiError, answer, api, type Schemas } from "$/api/client";
import type { Events, Happening } from "$/api/events";
import { tagged } from "./names";

export type Build = Schemas["BuildBody"];

const PAGE = 50;

/** What its template is called, or will be. */
export function nameOf(build: Build): string {
  return tagged(build.name, build.tags[0] ?? "default");
}

/** Which build an event tells of, if of any. */
export function buildOf({ kind, data }: Happening): string {
  const id = data.build_id;
  return kind.startsWith("build.") && typeof id === "string" ? id : "";
}

export class Builds {
  error = $state.raw<ApiError | null>(null);
  /** The first page was read. */
  loaded = $state(false);
  /** Where the next page begins; empty at the end. */
  next = $state("");
  #found = new SvelteMap<string, Build>();

  all = $derived.by(() => [...this.#found.values()].sort((a, b) => b.created_at - a.created_at));

  /** Reads the newest and follows the events. Returns what ends that. */
  follow(events: Events): () => void {
    const end = events.listen((happening) => {
      const id = buildOf(happening);
      if (id) void this.#readOne(id);
    });
    void this.load();
    return end;
  }

  load = (): Promise<void> => this.#read("");

  more = (): Promise<void> => this.#read(this.next);

  async #read(cursor: string): Promise<void> {
    try {
      const query = { limit: PAGE, cursor };
      const page = await answer(api.GET("/v1/builds", { params: { query } }));
      for (const each of page.items) this.#put(each);
      // Whoever reads the first page again has read the others already.
      if (cursor || !this.loaded) this.next = page.next;
      this.loaded = true;
      this.error = null;
    } catch (thrown) {
      this.error = ApiError.of(thrown);
    }
  }

  async #readOne(id: string): Promise<void> {
    const path = { build_id: id };
    try {
      this.#put(await answer(api.GET("/v1/builds/{build_id}", { params: { path } })));
    } catch (thrown) {
      this.error = ApiError.of(thrown);
    }
  }

  /** Of two answers that cross the one that knows of its end counts. */
  #put(build: Build): void {
    if (!build.finished_at && this.#found.get(build.id)?.finished_at) return;
    this.#found.set(build.id, build);
  }
}
