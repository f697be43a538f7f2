/** Files on their way into a sandbox. They go on while other pages are shown. */
import { ApiError, credentials } from "$/api/client";
import type { Guest } from "./guest";

const AT_ONCE = 2;

/** A file, and where it is to be. */
export interface Given {
  path: string;
  file: File;
}

export class Upload {
  readonly path: string;
  readonly file: File;
  state = $state<"waiting" | "going" | "done" | "failed" | "cancelled">("waiting");
  sentBytes = $state(0);
  error = $state.raw<ApiError | null>(null);
  #call: XMLHttpRequest | null = null;

  constructor({ path, file }: Given) {
    this.path = path;
    this.file = file;
  }

  get over(): boolean {
    return this.state !== "waiting" && this.state !== "going";
  }

  /** Sends it; whatever becomes of it is in its state. `fetch` would not tell how far it is. */
  async send(url: string): Promise<void> {
    this.state = "going";
    const call = (this.#call = new XMLHttpRequest());
    call.open("PUT", url);
    call.setRequestHeader("X-CSRF-Token", credentials.csrfToken);
    call.upload.onprogress = (event) => (this.sentBytes = event.loaded);
    await new Promise((resolve) => {
      call.onloadend = resolve;
      call.send(this.file);
    });
    // Called off meanwhile.
    if (this.over) return;
    this.error = await failure(call);
    this.state = this.error ? "failed" : "done";
  }

  cancel(): void {
    if (this.over) return;
    this.state = "cancelled";
    this.#call?.abort();
  }
}

async function failure(call: XMLHttpRequest): Promise<ApiError | null> {
  if (call.status >= 200 && call.status < 300) return null;
  if (call.status === 401) credentials.onEnded();
  if (!call.status) return ApiError.of(new TypeError());
  return await ApiError.from(new Response(call.responseText, { status: call.status }));
}

export class Uploads {
  all = $state.raw<Upload[]>([]);
  /** How often all that was asked for was over. */
  finished = $state(0);
  #guest: Guest;
  #sending = 0;

  constructor(guest: Guest) {
    this.#guest = guest;
    addEventListener("beforeunload", (event) => {
      if (this.going) event.preventDefault();
    });
  }

  get going(): boolean {
    return this.all.some((each) => !each.over);
  }

  /** Sends these after those that wait. */
  add(given: Given[]): void {
    this.all = [...this.all, ...given.map((each) => new Upload(each))];
    for (let free = AT_ONCE - this.#sending; free > 0; free--) void this.#work();
  }

  cancel(): void {
    for (const each of this.all) each.cancel();
  }

  /** Forgets those that are over. */
  clear(): void {
    this.all = this.all.filter((each) => !each.over);
  }

  async #work(): Promise<void> {
    this.#sending += 1;
    for (let next = this.#next(); next; next = this.#next()) {
      await next.send(this.#guest.contentUrl(next.path));
    }
    this.#sending -= 1;
    if (!this.#sending) this.finished += 1;
  }

  #next(): Upload | undefined {
    return this.all.find((each) => each.state === "waiting");
  }
}

const known = new Map<string, Uploads>();

/** Those of a sandbox. */
export function uploadsOf(guest: Guest): Uploads {
  let found = known.get(guest.id);
  if (!found) known.set(guest.id, (found = new Uploads(guest)));
  return found;
}
