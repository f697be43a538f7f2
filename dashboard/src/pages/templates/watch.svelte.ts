/** One build as it goes on: what it is, its steps, and its log to the end. */
import { EventSourceParserStream } from "eventsource-parser/stream";
import { on } from "svelte/events";
import { ApiError, answer, api, request, type Schemas } from "$/api/client";
import { passed, type Events } from "$/api/events";
import { buildOf, type Build } from "./builds.svelte";
import { withLine, type Line, type Step } from "./steps";

/** Lines that are put together: what is shown of the log comes and goes by such blocks. */
export interface Block {
  first: number;
  lines: Line[];
}

type Piece = { kind: "line"; line: Line } | { kind: "end"; build: Build };

const BLOCK = 100;
/** Lines of one answer, at most. */
const PAGE = 1000;
const GATHER_MS = 80;
const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 15_000;

export class Watch {
  readonly id: string;
  value = $state.raw<Build | null>(null);
  error = $state.raw<ApiError | null>(null);
  steps = $state.raw<Step[]>([]);
  blocks = $state.raw<Block[]>([]);
  #gathered: Line[] = [];
  #timer: ReturnType<typeof setTimeout> | undefined;
  #after = 0;
  #stop: AbortController | null = null;

  constructor(id: string) {
    this.id = id;
  }

  /** Reads it and follows it to its end. Returns what ends that. */
  follow(events: Events): () => void {
    const ends = [
      events.listen((happening) => {
        if (buildOf(happening) === this.id) void this.load();
      }),
      // As with events: a page that nobody sees has no connection of its own.
      on(document, "visibilitychange", () => this.#turn()),
    ];
    void this.load();
    this.#turn();
    return () => {
      for (const end of ends) end();
      this.#stop?.abort();
      clearTimeout(this.#timer);
    };
  }

  load = async (): Promise<void> => {
    const path = { build_id: this.id };
    try {
      this.put(await answer(api.GET("/v1/builds/{build_id}", { params: { path } })));
      this.error = null;
    } catch (thrown) {
      this.error = ApiError.of(thrown);
    }
  };

  /** Of two answers that cross the one that knows of its end counts. */
  put(build: Build): void {
    if (build.finished_at || !this.value?.finished_at) this.value = build;
  }

  /** Of the log after what is known of it. */
  get #path(): string {
    return `/v1/builds/${encodeURIComponent(this.id)}/logs?after=${this.#after}`;
  }

  #turn(): void {
    if (document.hidden) {
      this.#stop?.abort();
      this.#stop = null;
    } else if (!this.#stop) {
      this.#stop = new AbortController();
      void this.#read(this.#stop.signal);
    }
  }

  /** Reads the log to its end, again after its last line whenever the stream breaks. */
  async #read(signal: AbortSignal): Promise<void> {
    let wait = FIRST_WAIT_MS;
    while (!signal.aborted) {
      try {
        await this.#catchUp(signal);
        for await (const piece of this.#stream(signal)) {
          wait = FIRST_WAIT_MS;
          if (piece.kind === "line") this.#take(piece.line);
          else return this.put(piece.build);
        }
      } catch (thrown) {
        // Neither waiting nor asking again helps whoever is logged out, or asks for what is not.
        if (signal.aborted || [401, 404].includes(ApiError.of(thrown).status)) return;
      }
      await passed(wait * (0.5 + Math.random()), signal);
      wait = Math.min(2 * wait, LONGEST_WAIT_MS);
    }
  }

  /** Reads what is there already, which is sooner done in pages than line by line. */
  async #catchUp(signal: AbortSignal): Promise<void> {
    for (;;) {
      const response = await request(`${this.#path}&limit=${PAGE}`, { signal });
      const page = (await response.json()) as Schemas["LinePage"];
      if (signal.aborted) return;
      for (const line of page.items) this.#take(line);
      if (page.items.length < PAGE) return;
    }
  }

  async *#stream(signal: AbortSignal): AsyncGenerator<Piece> {
    const response = await request(this.#path, {
      signal,
      headers: { Accept: "text/event-stream" },
    });
    if (!response.body) return;
    const reader = response.body
      .pipeThrough(new TextDecoderStream() as ReadableWritablePair<string, Uint8Array<ArrayBuffer>>)
      .pipeThrough(new EventSourceParserStream())
      .getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done || signal.aborted) return;
      const data: unknown = JSON.parse(value.data);
      if (value.event === "end") yield { kind: "end", build: data as Build };
      else yield { kind: "line", line: data as Line };
    }
  }

  #take(line: Line): void {
    this.#after = line.number;
    this.#gathered.push(line);
    this.#timer ??= setTimeout(() => this.#show(), GATHER_MS);
  }

  #show(): void {
    this.#timer = undefined;
    const news = this.#gathered.splice(0);
    const steps = news.reduce(withLine, this.steps);
    // What is known of a build tells how many steps it has.
    if (steps.at(-1)?.number !== this.steps.at(-1)?.number) void this.load();
    this.steps = steps;
    this.blocks = extended(this.blocks, news);
  }
}

/** Blocks with more lines; those that are full stay the same. */
export function extended(blocks: Block[], lines: Line[]): Block[] {
  const found = [...blocks];
  for (let at = 0; at < lines.length;) {
    const last = found.at(-1);
    const open = last && last.lines.length < BLOCK ? last : null;
    const room = BLOCK - (open?.lines.length ?? 0);
    const taken = lines.slice(at, at + room);
    if (open) found[found.length - 1] = { ...open, lines: [...open.lines, ...taken] };
    else found.push({ first: taken[0]?.number ?? 0, lines: taken });
    at += taken.length;
  }
  return found;
}
