/** A command line that is run in a sandbox, and what it says. */
import { ApiError } from "$/api/client";
import { Channel, type Message, type Opening } from "$/api/channel";
import { plain, tail } from "./lines";

export interface Asked {
  line: string;
  user: string;
  /** Of standard input; empty is none at all. */
  input: string;
}

type State = "ready" | "running" | "ended" | "lost" | "failed";

const MOST_CHARACTERS = 128 * 1024;
const GATHER_MS = 60;

export class Run {
  state = $state<State>("ready");
  /** The end of what it said. */
  output = $state("");
  /** There was more than is shown. */
  cut = $state(false);
  /** How it ended. */
  end = $state("");
  error = $state.raw<ApiError | null>(null);
  #channel: Channel | null = null;
  #decoder = new TextDecoder();
  #text = "";
  #taken: (() => void)[] = [];
  #timer: ReturnType<typeof setTimeout> | undefined;

  start(sandboxId: string, { line, user, input }: Asked): void {
    this.hangUp();
    this.state = "running";
    this.output = this.end = this.#text = "";
    this.cut = false;
    this.error = null;
    this.#decoder = new TextDecoder();
    const opening: Opening = {
      type: "start",
      cmd: "sh",
      args: ["-c", line],
      user,
      stdin: input !== "",
    };
    this.#channel = new Channel(`${sandboxId}/exec/stream`, opening, {
      told: (message) => this.#hear(message, input),
      output: (bytes, taken) => this.#gather(bytes, taken),
      closed: () => {
        if (this.state === "running") this.state = "lost";
      },
    });
  }

  /** Ends the command and all that it started. */
  stop(): void {
    this.#channel?.signal("SIGKILL");
  }

  /** Listens no longer; the command goes on. */
  hangUp(): void {
    this.#channel?.close();
    this.#channel = null;
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#taken = [];
  }

  #hear(message: Exclude<Message, { type: "ping" }>, input: string): void {
    if (message.type === "exit") {
      this.#show();
      this.end = message.error || `Exit code ${message.exit_code}`;
      this.state = "ended";
    } else if (message.type === "error" && message.fatal) {
      this.error = new ApiError(0, message);
      this.state = "failed";
    } else if (message.type === "start" && input) {
      this.#channel?.input(new TextEncoder().encode(input));
      this.#channel?.endInput();
    }
  }

  /** What comes in a short time is shown at once, and no more comes meanwhile. */
  #gather(bytes: Uint8Array, taken: () => void): void {
    const text = this.#text + this.#decoder.decode(bytes, { stream: true });
    this.#text = tail(text, MOST_CHARACTERS);
    if (this.#text.length < text.length) this.cut = true;
    this.#taken.push(taken);
    this.#timer ??= setTimeout(() => this.#show(), GATHER_MS);
  }

  #show(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.output = plain(this.#text);
    for (const taken of this.#taken.splice(0)) taken();
  }
}
