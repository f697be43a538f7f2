/** Charts, by uPlot, which is loaded when the first one is drawn. */
import type uPlot from "uplot";

export interface Drawing {
  /** How many lines there are; their colours are those of the `.swatch`es beside the frame. */
  lines: number;
  shown: (value: number) => string;
  steps: number[];
  /** Told of the point that is pointed at. */
  point: (index: number | null) => void;
}

const MINUTE_S = 60;
const HOUR_S = 60 * MINUTE_S;
const DAY_S = 24 * HOUR_S;
/** Between the marks of the time. */
const TIMES_S = [
  ...[10, 30],
  ...[1, 2, 5, 10, 20, 30].map((minutes) => minutes * MINUTE_S),
  ...[1, 2, 4, 6, 12].map((hours) => hours * HOUR_S),
  ...[1, 2, 5, 10].map((days) => days * DAY_S),
];
const CLOCK = new Intl.DateTimeFormat(undefined, { hour: "numeric", minute: "2-digit" });
const SECONDS = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
const DATE = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short" });

/** A chart without data in a frame, whose own colours are those of its text and its grid. */
export async function draw(frame: HTMLElement, drawing: Drawing): Promise<uPlot> {
  const { default: UPlot } = await import("uplot");
  const style = getComputedStyle(frame);
  const axis: uPlot.Axis = {
    font: `12px ${style.fontFamily}`,
    stroke: () => style.color,
    grid: { stroke: () => style.borderTopColor, width: 1 },
    ticks: { show: false },
  };
  const swatches = frame.parentElement?.querySelectorAll(".swatch") ?? [];
  const line = (index: number): uPlot.Series => ({
    stroke: () => getComputedStyle(swatches[index] ?? frame).color,
    width: 2,
    // Where they coincide both are seen.
    dash: index ? [6, 4] : undefined,
    points: { show: false },
    paths: UPlot.paths.stepped?.({ align: 1 }),
  });
  const options: uPlot.Options = {
    width: frame.clientWidth,
    height: frame.clientHeight,
    padding: [12, 12, 0, 0],
    legend: { show: false },
    cursor: { drag: { x: false, y: false }, y: false, points: { show: false } },
    scales: { y: { range: (_, __, most) => [0, Math.max(most, drawing.steps[0] ?? 1) * 1.1] } },
    series: [{}, ...Array.from({ length: drawing.lines }, (_, index) => line(index))],
    axes: [
      {
        ...axis,
        size: 30,
        space: 76,
        incrs: TIMES_S,
        values: (_, splits, __, ___, step) => splits.map((at) => moment(at, step)),
      },
      {
        ...axis,
        size: 66,
        incrs: drawing.steps,
        values: (_, splits) => splits.map(drawing.shown),
      },
    ],
    hooks: { setCursor: [(plot) => drawing.point(plot.cursor.idx ?? null)] },
  };
  return new UPlot(options, [[]], frame);
}

/** A time at the axis, as exact as its marks are. */
function moment(at: number, step: number): string {
  if (step >= DAY_S) return DATE.format(at * 1000);
  return (step < MINUTE_S ? SECONDS : CLOCK).format(at * 1000);
}
