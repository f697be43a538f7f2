/** One shell on a terminal of a sandbox, and the connection to it, which comes again. */
import { ApiError, answer, api } from "$/api/client";
import { Channel, type Failure, type Message, type Opening } from "$/api/channel";
import type { Current } from "../current.svelte";
import type { Screen } from "./screen";

export type User = "root" | "user";

type State =
  | { kind: "connecting" | "connected" | "again" | "paused" }
  /** Tried again at a time, in milliseconds. */
  | { kind: "lost"; at: number }
  | { kind: "ended"; text: string }
  | { kind: "failed"; error: ApiError };

const SHELLS = ["/bin/bash", "/bin/sh"];
const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 15_000;
/** While the page is hidden little is shown; so much is taken nevertheless. */
const HIDDEN_BYTES = 1 << 23;

export class Shell {
  readonly tag: string;
  readonly number: number;
  readonly user: User;
  state = $state.raw<State>({ kind: "connecting" });
  /** What the programs in it call it. */
  title = $state("");
  #current: Current;
  #screen: Screen | null = null;
  #channel: Channel | null = null;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #wait = FIRST_WAIT_MS;
  #shell = 0;
  #waiting = 0;
  /** It may run: it was asked for, or found. */
  #begun: boolean;
  /** Nobody said that it was started; the connection may have been lost before that. */
  #unsure = false;
  /** What it showed before is not here. */
  #blank: boolean;

  /** With `found` it runs already. */
  constructor(current: Current, tag: string, number: number, user: User, found: boolean) {
    this.#current = current;
    this.tag = tag;
    this.number = number;
    this.user = user;
    this.#begun = this.#blank = found;
  }

  get name(): string {
    return `Terminal ${this.number}`;
  }

  get over(): boolean {
    return this.state.kind === "ended" || this.state.kind === "failed";
  }

  get screen(): Screen | null {
    return this.#screen;
  }

  /** Shows it in `place`, and connects when that is done for the first time. */
  async show(place: Element, alive: () => boolean): Promise<void> {
    if (this.#screen) {
      place.append(this.#screen.host);
      this.#screen.fit();
      return;
    }
    const { Screen } = await import("./screen");
    if (!alive() || this.#screen) return;
    this.#screen = new Screen(place, {
      data: (bytes) => this.#channel?.input(bytes),
      size: (cols, rows) => this.#channel?.resize(cols, rows),
      title: (title) => (this.title = title),
    });
    this.#connect();
  }

  /** Tries at once what was to be tried later. */
  wake(): void {
    const waits = this.state.kind === "lost" || this.state.kind === "paused";
    if (!waits || !this.#current.running) return;
    this.#wait = FIRST_WAIT_MS;
    this.#connect();
  }

  /** The sandbox runs no longer: what comes after its sleep comes by another connection. */
  sleep(): void {
    if (this.over || !this.#screen) return;
    this.#halt();
    this.state = { kind: "paused" };
  }

  /** Ends the shell and all that it started. Throws ApiError. */
  async kill(): Promise<void> {
    if (this.over) return;
    const path = { sandbox_id: this.#current.id, process: this.tag };
    try {
      await answer(
        api.DELETE("/v1/sandboxes/{sandbox_id}/processes/{process}", {
          params: { path, query: { signal: "SIGKILL" } },
        }),
      );
    } catch (thrown) {
      // Then it is over.
      if (ApiError.of(thrown).status !== 404) throw thrown;
    }
  }

  /** Hangs up; the shell goes on. */
  dispose(): void {
    clearTimeout(this.#timer);
    this.#channel?.close();
    this.#screen?.dispose();
  }

  #connect(): void {
    clearTimeout(this.#timer);
    this.#channel?.close();
    this.#waiting = 0;
    const screen = this.#screen;
    if (!screen) return;
    this.state = { kind: this.#begun ? "again" : "connecting" };
    this.#channel = new Channel(`${this.#current.id}/pty`, this.#opening(screen), {
      told: (message) => this.#hear(message, screen),
      output: (bytes, taken) => this.#write(screen, bytes, taken),
      closed: () => this.#lost(),
    });
  }

  #opening(screen: Screen): Opening {
    if (this.#begun) return { type: "connect", tag: this.tag };
    this.#begun = true;
    return {
      type: "start",
      cmd: SHELLS[this.#shell],
      args: ["-l"],
      envs: { TERM: "xterm-256color", COLORTERM: "truecolor" },
      tag: this.tag,
      user: this.user,
      ...screen.size,
    };
  }

  #hear(message: Exclude<Message, { type: "ping" }>, screen: Screen): void {
    switch (message.type) {
      case "start":
      case "started":
        this.#wait = FIRST_WAIT_MS;
        this.#unsure = false;
        this.state = { kind: "connected" };
        screen.listening = true;
        this.#resize(screen);
        break;
      case "exit":
        this.#end(message.error || `Ended with exit code ${message.exit_code}`);
        break;
      case "error":
        if (message.fatal) this.#refused(message);
    }
  }

  /** Says how large it is, at first by way of another size: then programs draw themselves anew. */
  #resize(screen: Screen): void {
    const { cols, rows } = screen.size;
    if (this.#blank && rows > 1) this.#channel?.resize(cols, rows - 1);
    this.#blank = false;
    this.#channel?.resize(cols, rows);
  }

  #write(screen: Screen, bytes: Uint8Array, taken: () => void): void {
    this.#waiting += bytes.length;
    const early = document.hidden && this.#waiting < HIDDEN_BYTES;
    if (early) taken();
    screen.write(bytes, () => {
      this.#waiting = Math.max(0, this.#waiting - bytes.length);
      if (!early) taken();
    });
  }

  #refused(failure: Failure): void {
    switch (failure.code) {
      case "command_not_started":
        if (++this.#shell < SHELLS.length) {
          this.#begun = false;
          this.#connect();
        } else {
          this.#fail(failure);
        }
        break;
      case "not_found":
        if (this.#unsure) {
          this.#begun = this.#unsure = false;
          this.#connect();
        } else {
          this.#end("It has ended meanwhile");
        }
        break;
      case "invalid":
      case "denied":
      case "unauthenticated":
        this.#fail(failure);
        break;
      default:
        this.#lost();
    }
  }

  #lost(): void {
    if (this.state.kind === "connecting") this.#unsure = true;
    if (!this.#current.running) {
      this.sleep();
      return;
    }
    if (this.over) return;
    this.#halt();
    const wait = this.#wait * (0.5 + Math.random());
    this.#wait = Math.min(2 * this.#wait, LONGEST_WAIT_MS);
    this.state = { kind: "lost", at: Date.now() + wait };
    this.#timer = setTimeout(() => this.#connect(), wait);
  }

  #end(text: string): void {
    this.#halt();
    this.state = { kind: "ended", text };
  }

  #fail(failure: Failure): void {
    this.#halt();
    this.state = { kind: "failed", error: new ApiError(0, failure) };
  }

  #halt(): void {
    clearTimeout(this.#timer);
    this.#channel?.close();
    this.#channel = null;
    if (this.#screen) this.#screen.listening = false;
  }
}
