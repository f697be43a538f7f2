/** The steps of a build, as its log tells of them. */
import type { Schemas } from "$/api/client";

export type Line = Schemas["LineBody"];

export interface Step {
  number: number;
  /** `pre`, `build`, `post`, or empty. */
  phase: string;
  /** As it was written. */
  text: string;
  /** Number of its first line in the log. */
  line: number;
  /** Seconds since the epoch. */
  begun: number;
  /** What it took in seconds, once it is done. */
  took: number | null;
}

export type StepState = "done" | "cached" | "running" | "failed" | "cancelled";

const CACHED = " (cached)";
// Of level `debug` are the words of the builder alone, never those of a command.
const DONE = /^done in ([\d.]+) s$/;

/** The steps with what one more line says. */
export function withLine(steps: Step[], line: Line): Step[] {
  if (!line.step) return steps;
  const last = steps.at(-1);
  if (last?.number !== line.step) {
    // A build that was interrupted begins its steps again.
    return [...steps.filter((each) => each.number < line.step), firstOf(line)];
  }
  const done = line.level === "debug" ? DONE.exec(line.message) : null;
  return done ? [...steps.slice(0, -1), { ...last, took: Number(done[1]) }] : steps;
}

function firstOf(line: Line): Step {
  return {
    number: line.step,
    phase: line.phase,
    text: line.message,
    line: line.number,
    begun: line.time,
    took: null,
  };
}

/** How a step of a build is; `isLast` of those that were begun. */
export function stateOf(step: Step, build: Schemas["BuildBody"], isLast: boolean): StepState {
  if (build.error?.step === step.number) return "failed";
  if (step.took !== null) return "done";
  if (isLast && !build.finished_at) return "running";
  // Unlike what was done, what was found done has no end.
  if (step.text.endsWith(CACHED)) return "cached";
  return build.state === "ready" || !isLast ? "done" : "cancelled";
}

/** A step as it was written, whatever became of it. */
export function written(step: Step, state: StepState): string {
  return state === "cached" ? step.text.slice(0, -CACHED.length) : step.text;
}
