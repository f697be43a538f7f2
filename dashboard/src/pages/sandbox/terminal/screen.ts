/**
 * What a terminal shows, and what is typed there: xterm.js, which is loaded with this module.
 *
 * What comes from a sandbox may be hostile. It gets to draw, to name its window, and the answers
 * without which programs do not work: where the cursor is, and what kind of terminal this is. It
 * does not get the clipboard, links whose text hides where they lead, or the colours of the page.
 */
import { FitAddon } from "@xterm/addon-fit";
import { Unicode11Addon } from "@xterm/addon-unicode11";
import { WebLinksAddon } from "@xterm/addon-web-links";
import { Terminal, type ITheme } from "@xterm/xterm";
import "@xterm/xterm/css/xterm.css";
import { allowStyles } from "./document";

allowStyles();

export interface Typed {
  data: (bytes: Uint8Array<ArrayBuffer>) => void;
  size: (cols: number, rows: number) => void;
  title: (title: string) => void;
}

const SCROLLBACK_LINES = 5000;
const LONGEST_TITLE = 80;
/** Links (8), the clipboard (52), and colours of the palette and the page, set or asked for. */
const REFUSED_OSC = [4, 8, 10, 11, 12, 52, 104, 110, 111, 112];
/** How long after Escape a Tab leaves the terminal. */
const LEAVE_MS = 3000;

const COLOURS = {
  background: "--surface",
  foreground: "--text",
  cursor: "--accent",
  cursorAccent: "--surface",
  selectionBackground: "--accent-soft",
  black: "--text",
  red: "--danger",
  green: "--good",
  yellow: "--warn",
  blue: "--info",
  magenta: "--series-3",
  cyan: "--accent",
  white: "--muted",
  brightBlack: "--muted",
  brightRed: "--danger-hover",
  brightGreen: "--good",
  brightYellow: "--warn",
  brightBlue: "--info",
  brightMagenta: "--series-3",
  brightCyan: "--accent-hover",
  brightWhite: "--text",
} as const satisfies Partial<Record<keyof ITheme, string>>;

export class Screen {
  /** Holds all of it, and may move in the page. */
  readonly host = document.createElement("div");
  #terminal: Terminal;
  #fit = new FitAddon();
  #sizes = new ResizeObserver(() => this.fit());

  /** `place` is in the page: what a character measures is found out there. */
  constructor(place: Element, typed: Typed) {
    place.append(this.host);
    this.#terminal = new Terminal({
      allowProposedApi: true,
      cursorBlink: false,
      fontFamily: getComputedStyle(this.host).getPropertyValue("--mono"),
      fontSize: 14,
      minimumContrastRatio: 4.5,
      scrollback: SCROLLBACK_LINES,
      theme: this.#theme(),
    });
    this.#terminal.loadAddon(this.#fit);
    this.#terminal.loadAddon(new Unicode11Addon());
    this.#terminal.unicode.activeVersion = "11";
    this.#terminal.loadAddon(new WebLinksAddon(follow));
    this.#terminal.open(this.host);
    this.#refuse();
    this.#listen(typed);
    this.#sizes.observe(this.host);
    this.fit();
  }

  get size(): { cols: number; rows: number } {
    return { cols: this.#terminal.cols, rows: this.#terminal.rows };
  }

  /** Shows what came; `shown` is called when it is. */
  write(bytes: Uint8Array, shown: () => void): void {
    this.#terminal.write(bytes, shown);
  }

  /** Whether what is typed goes anywhere. */
  set listening(listening: boolean) {
    this.#terminal.options.disableStdin = !listening;
  }

  /** The library tells those who hear the page what is shown. */
  set spoken(spoken: boolean) {
    this.#terminal.options.screenReaderMode = spoken;
  }

  focus(): void {
    this.#terminal.focus();
  }

  /** As many characters as there is room for. */
  fit(): void {
    if (this.host.isConnected && this.host.clientWidth) this.#fit.fit();
  }

  /** The page's colours, as they are now. */
  paint(): void {
    if (this.host.isConnected) this.#terminal.options.theme = this.#theme();
  }

  dispose(): void {
    this.#sizes.disconnect();
    this.#terminal.dispose();
    this.host.remove();
  }

  #refuse(): void {
    const { parser } = this.#terminal;
    for (const number of REFUSED_OSC) parser.registerOscHandler(number, () => true);
    // Asks for settings; what answers is typed into the shell.
    parser.registerDcsHandler({ intermediates: "$", final: "q" }, () => true);
  }

  #listen({ data, size, title }: Typed): void {
    const encoder = new TextEncoder();
    let escaped = -Infinity;
    this.#terminal.onData((text) => data(encoder.encode(text)));
    this.#terminal.onBinary((text) =>
      data(Uint8Array.from(text, (character) => character.charCodeAt(0))),
    );
    this.#terminal.onResize(({ cols, rows }) => size(cols, rows));
    this.#terminal.onTitleChange((text) => title(text.slice(0, LONGEST_TITLE)));
    this.#terminal.attachCustomKeyEventHandler((event) => {
      const leaves = event.key === "Tab" && event.timeStamp - escaped < LEAVE_MS;
      if (event.type === "keydown" && event.key !== "Shift") {
        escaped = event.key === "Escape" ? event.timeStamp : -Infinity;
      }
      // What the library does not take the browser does: it moves the focus.
      return !leaves;
    });
  }

  #theme(): ITheme {
    const colours = Object.entries(COLOURS).map(([name, token]) => {
      // Each has an element of its own: from one colour to another there may be a transition.
      const probe = document.createElement("span");
      probe.style.color = `var(${token})`;
      this.host.append(probe);
      const { color } = getComputedStyle(probe);
      probe.remove();
      return [name, color];
    });
    return Object.fromEntries(colours) as ITheme;
  }
}

function follow(_: MouseEvent, address: string): void {
  const { protocol } = new URL(address);
  if (protocol === "http:" || protocol === "https:") {
    window.open(address, "_blank", "noopener,noreferrer");
  }
}
