/**
 * A WebSocket into a sandbox: a command as it runs, or a terminal. The control plane's `streams.py`
 * says which messages there are. Output comes no faster than it is taken.
 */

export type Message =
  | { type: "start" | "started"; pid: number; tag: string }
  | { type: "exit"; exit_code: number; signal: number; error: string }
  | {
      type: "error";
      code: string;
      message: string;
      hint: string;
      retryable: boolean;
      fatal: boolean;
    }
  | { type: "ping" };

export type Failure = Extract<Message, { type: "error" }>;

/** What is said first: what to start, or what to connect to. */
export type Opening = { type: "start" | "connect" } & Record<string, unknown>;

export interface Listener {
  told: (message: Exclude<Message, { type: "ping" }>) => void;
  /** Call `taken` when that much is dealt with. */
  output: (bytes: Uint8Array, taken: () => void) => void;
  /** It is over, be it that there was no connection. Nothing follows. */
  closed: () => void;
}

/** Output that is under way or not dealt with, at most. */
const WINDOW_BYTES = 1 << 19;
const TELL_BYTES = 1 << 16;
/** The other end says something every 30 s; without that the connection is gone. */
const SILENCE_MS = 75_000;
const PIECE_BYTES = 1 << 15;

export class Channel {
  #socket: WebSocket;
  #listener: Listener;
  #taken = 0;
  #watch: ReturnType<typeof setTimeout> | undefined;
  #over = false;

  /** `path` is below `/v1/sandboxes/`. */
  constructor(path: string, opening: Opening, listener: Listener) {
    this.#listener = listener;
    this.#socket = new WebSocket(new URL(`/v1/sandboxes/${path}`, location.origin));
    this.#socket.binaryType = "arraybuffer";
    this.#socket.addEventListener("open", () =>
      this.#say({ ...opening, binary: true, window: WINDOW_BYTES }),
    );
    this.#socket.addEventListener("message", (event: MessageEvent<string | ArrayBuffer>) =>
      this.#hear(event.data),
    );
    this.#socket.addEventListener("close", () => this.#end());
    this.#expect();
  }

  /** Sends input. What is sent while there is no connection is lost. */
  input(bytes: Uint8Array<ArrayBuffer>): void {
    if (this.#socket.readyState !== WebSocket.OPEN) return;
    for (let at = 0; at < bytes.length; at += PIECE_BYTES) {
      this.#socket.send(bytes.subarray(at, at + PIECE_BYTES));
    }
  }

  resize(cols: number, rows: number): void {
    this.#say({ type: "resize", cols, rows });
  }

  /** No more input comes. */
  endInput(): void {
    this.#say({ type: "stdin_close" });
  }

  signal(name: "SIGINT" | "SIGTERM" | "SIGKILL"): void {
    this.#say({ type: "signal", signal: name });
  }

  /** Hangs up; what runs goes on. */
  close(): void {
    this.#over = true;
    clearTimeout(this.#watch);
    this.#socket.close();
  }

  #say(message: { type: string } & Record<string, unknown>): void {
    if (this.#socket.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(message));
  }

  #hear(data: string | ArrayBuffer): void {
    if (this.#over) return;
    this.#expect();
    if (typeof data === "string") {
      const message = JSON.parse(data) as Message;
      if (message.type !== "ping") this.#listener.told(message);
      return;
    }
    // The first byte says which output it is.
    const bytes = new Uint8Array(data, 1);
    this.#listener.output(bytes, () => this.#take(bytes.length));
  }

  #take(count: number): void {
    this.#taken += count;
    if (this.#taken < TELL_BYTES) return;
    this.#say({ type: "taken", bytes: this.#taken });
    this.#taken = 0;
  }

  #expect(): void {
    clearTimeout(this.#watch);
    this.#watch = setTimeout(() => {
      this.#socket.close();
      this.#end();
    }, SILENCE_MS);
  }

  #end(): void {
    if (this.#over) return;
    this.#over = true;
    clearTimeout(this.#watch);
    this.#listener.closed();
  }
}
