/** A chart of one series over time. Loaded when the first is shown: the library is large. */
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import type { Series } from "./figures";

const HEIGHT = 150;
/** So few points are seen as such: a line between two may be too short to be seen. */
const FEW = 40;

export interface Look {
  /** A token, as `--series-1`. */
  colour: string;
  /** Of values on the axis. */
  format: (value: number) => string;
  /** How far apart the lines of the axis may be. */
  steps: number[];
  /** The axis goes at least so far. */
  most: number;
  /** Called with what the pointer is at: its index, or null. */
  onpoint: (index: number | null) => void;
}

export class Plot {
  #element: HTMLElement;
  #plot: uPlot;
  #until = 0;
  #length = 0;

  /** Draws into `element`. */
  constructor(element: HTMLElement, look: Look) {
    this.#element = element;
    this.#plot = new uPlot(this.#options(look), [[], []], element);
  }

  /** Shows what was used in the `length` seconds until a time, in seconds since the epoch. */
  show({ times, values }: Series, until: number, length: number): void {
    this.#until = until;
    this.#length = length;
    this.#plot.setData([times, values]);
  }

  /** Fits it into its element. */
  resize(): void {
    const width = this.#element.clientWidth;
    if (width > 0 && width !== this.#plot.width) this.#plot.setSize({ width, height: HEIGHT });
  }

  /** Takes the colours as they are now. */
  redraw(): void {
    this.#plot.redraw(false);
  }

  destroy(): void {
    this.#plot.destroy();
  }

  #options(look: Look): uPlot.Options {
    const line = (): string => this.#colour("--line");
    const axis: uPlot.Axis = {
      stroke: () => this.#colour("--muted"),
      grid: { stroke: line, width: 1 },
      ticks: { stroke: line, width: 1, size: 4 },
      font: this.#font(),
    };
    return {
      width: Math.max(this.#element.clientWidth, 100),
      height: HEIGHT,
      padding: [8, 20, 0, 0],
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false } },
      scales: {
        x: { time: true, range: () => [this.#until - this.#length, this.#until] },
        y: { range: (_, __, highest) => [0, Math.max(look.most, (highest ?? 0) * 1.1)] },
      },
      axes: [
        { ...axis, space: 70, size: 26, values: (_, splits) => splits.map(clock) },
        {
          ...axis,
          space: 30,
          size: 64,
          incrs: look.steps,
          values: (_, splits) => splits.map(look.format),
        },
      ],
      series: [
        {},
        {
          stroke: () => this.#colour(look.colour),
          width: 1.5,
          points: { show: (plot) => plot.data[0].length < FEW, size: 4 },
        },
      ],
      hooks: { setCursor: [({ cursor }) => look.onpoint(cursor.idx ?? null)] },
    };
  }

  /** What a token is at the moment: a canvas knows no `light-dark()`. */
  #colour(token: string): string {
    // Of an element of its own: one that is there already may take a while to change its colour.
    const probe = document.createElement("span");
    probe.style.color = `var(${token})`;
    this.#element.append(probe);
    const { color } = getComputedStyle(probe);
    probe.remove();
    return color;
  }

  #font(): string {
    return `11px ${getComputedStyle(this.#element).fontFamily}`;
  }
}

const CLOCK = new Intl.DateTimeFormat(undefined, {
  hour: "2-digit",
  minute: "2-digit",
  hourCycle: "h23",
});

function clock(seconds: number): string {
  return CLOCK.format(seconds * 1000);
}
