/**
 * The team's events as they happen, over one stream for the whole page (server-sent events of
 * `/v1/events`). A stream that breaks is opened again after the last event that was seen, so none
 * is missed. While the page is hidden there is none: browsers open six connections to a server
 * for all of their tabs together.
 */
import { EventSourceParserStream } from "eventsource-parser/stream";
import { ApiError, request, type Schemas } from "./client";

export type Happening = Schemas["EventBody"];
export type Listener = (happening: Happening) => void;

const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 15_000;

export class Events {
  #listeners = new Set<Listener>();
  #stop: AbortController | null = null;
  #last: number | null = null;
  #onState: (connected: boolean) => void;

  /** `onState` is told whether events arrive. */
  constructor(onState: (connected: boolean) => void = () => {}) {
    this.#onState = onState;
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.#close();
      else this.#open();
    });
  }

  /** Calls `listener` for each event from now on. Returns what ends that. */
  listen(listener: Listener): () => void {
    this.#listeners.add(listener);
    this.#open();
    return () => {
      this.#listeners.delete(listener);
      if (!this.#listeners.size) this.forget();
    };
  }

  /** Ends the stream and begins anew: another team's events follow. */
  forget(): void {
    this.#close();
    this.#last = null;
    if (this.#listeners.size) this.#open();
  }

  #close(): void {
    this.#stop?.abort();
    this.#stop = null;
  }

  #open(): void {
    if (this.#stop || document.hidden || !this.#listeners.size) return;
    this.#stop = new AbortController();
    void this.#follow(this.#stop.signal);
  }

  async #follow(signal: AbortSignal): Promise<void> {
    let wait = FIRST_WAIT_MS;
    while (!signal.aborted) {
      try {
        for await (const happening of this.#stream(signal)) {
          wait = FIRST_WAIT_MS;
          for (const listener of [...this.#listeners]) listener(happening);
        }
      } catch (thrown) {
        // Whoever is logged out is sent to the login; a stream would not help.
        if (signal.aborted || (thrown instanceof ApiError && thrown.status === 401)) return;
      }
      this.#onState(false);
      await passed(wait * (0.5 + Math.random()), signal);
      wait = Math.min(2 * wait, LONGEST_WAIT_MS);
    }
  }

  async *#stream(signal: AbortSignal): AsyncGenerator<Happening> {
    const path = this.#last === null ? "/v1/events" : `/v1/events?after=${this.#last}`;
    const response = await request(path, { signal, headers: { Accept: "text/event-stream" } });
    if (!response.body) return;
    this.#onState(true);
    const reader = response.body
      .pipeThrough(new TextDecoderStream() as ReadableWritablePair<string, Uint8Array<ArrayBuffer>>)
      .pipeThrough(new EventSourceParserStream())
      .getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done || signal.aborted) return;
      const happening = JSON.parse(value.data) as Happening;
      this.#last = happening.id;
      yield happening;
    }
  }
}

/** Ends after a time, or when it is called off. */
export function passed(milliseconds: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener(
      "abort",
      () => {
        clearTimeout(timer);
        resolve();
      },
      { once: true },
    );
  });
}
