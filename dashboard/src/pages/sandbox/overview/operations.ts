/** The events of a sandbox, put together to what was done to it. */
import type { Schemas } from "$/api/client";
import { duration } from "$/lib/format";
import type { Happening } from "../current.svelte";

export type Phase = Schemas["PhaseBody"];

/** Something that was done to a sandbox, or happened to it. */
export interface Operation {
  /** Of its first event. */
  id: number;
  title: string;
  /** Seconds since the epoch. */
  at: number;
  /** From its first event to its last; null for what is one event, or goes on. */
  seconds: number | null;
  ongoing: boolean;
  failed: boolean;
  /** What is known of why and where, in the order in which it was told. */
  causes: string[];
  phases: Phase[];
}

const UNDER_WAY = new Set(["starting", "pausing", "resuming", "snapshotting", "stopping"]);

/** What an operation is called, by its first event, until more is known. */
const BEGUN: Record<string, string> = {
  starting: "Create",
  pausing: "Pause",
  resuming: "Resume",
  snapshotting: "Snapshot",
  stopping: "Destroy",
};

/** By the event that ended it, or that is all of it. */
const ENDED: Record<string, string> = {
  "sandbox.paused": "Pause",
  "sandbox.resumed": "Resume",
  "sandbox.rolled_back": "Rollback",
  "sandbox.forked": "Fork",
  "checkpoint.created": "Checkpoint",
  "template.created": "Snapshot",
  "sandbox.stopped": "Destroy",
  "sandbox.network_changed": "Network policy changed",
  "sandbox.timeout_changed": "Idle limit changed",
};

/** By what it was found to be on its host, where nothing of ours had made it so. */
const SEEN: Record<string, string> = {
  paused: "Paused by its host",
  running: "Found running",
  stopped: "Found ended",
  missing: "Its host is out of reach",
  error: "Found broken",
};

/** Newest first. */
export function operations(events: Happening[]): Operation[] {
  const groups: Happening[][] = [];
  let open: Happening[] | null = null;
  for (const event of events) {
    const underWay = UNDER_WAY.has(event.data.state ?? "");
    const begins = event.kind === `sandbox.${event.data.state ?? ""}` && underWay;
    // What begins before the last has ended has taken the sandbox from it.
    if (!open || begins) groups.push((open = [event]));
    else open.push(event);
    if (!underWay) open = null;
  }
  return groups.map(described).reverse();
}

function described(events: Happening[], at: number, all: Happening[][]): Operation {
  const [first] = events as [Happening];
  const last = events.at(-1) ?? first;
  const single = events.length === 1;
  const underWay = UNDER_WAY.has(last.data.state ?? "");
  const ongoing = underWay && at === all.length - 1;
  const phases = last.data.phases ?? [];
  return {
    id: first.id,
    title: single && !underWay ? titleOf(first) : (ended(last) ?? begun(first)),
    at: first.at,
    seconds: ongoing || single ? null : Math.max(last.at - first.at, sum(phases) / 1000),
    ongoing,
    failed: events.some((each) => each.data.error),
    causes: [...new Set(events.flatMap(causes))],
    phases,
  };
}

/** Of phases, in milliseconds. */
export function sum(phases: Phase[]): number {
  return phases.reduce((before, each) => before + each.ms, 0);
}

function titleOf(event: Happening): string {
  const state = event.data.state ?? "";
  const seen = event.data.seen || event.kind === "sandbox.missing" ? SEEN[state] : undefined;
  return seen ?? ended(event) ?? event.kind.replace(/^sandbox\./, "").replaceAll("_", " ");
}

/** What failed is called by what it was to be. */
function ended(event: Happening): string | undefined {
  return event.data.error ? undefined : ENDED[event.kind];
}

function begun(event: Happening): string {
  if (text(event, "parent")) return "Create as a fork";
  return BEGUN[event.data.state ?? ""] ?? event.kind;
}

function causes(event: Happening): string[] {
  const { kind, data } = event;
  const found: string[] = [];
  if (kind === "sandbox.starting" && text(event, "template"))
    found.push(`from template ${text(event, "template")}`);
  if (text(event, "parent")) found.push(`of sandbox ${text(event, "parent")}`);
  if (data.host) found.push(`${PLACED[kind] ?? "on host"} ${data.host}`);
  if (kind === "sandbox.fetched" && typeof data.seconds === "number")
    found.push(`its template was fetched in ${duration(data.seconds)}`);
  if (kind === "sandbox.timeout_changed" && typeof data.timeout_s === "number")
    found.push(data.timeout_s ? `to ${duration(data.timeout_s)}` : "to none");
  if (kind === "sandbox.network_changed") found.push(policy(event));
  if (data.seen && data.state === "paused" && !data.reason) found.push("after its idle limit");
  if (data.reason) found.push(data.reason);
  if (data.error) found.push(data.error);
  return found;
}

const PLACED: Record<string, string> = {
  "sandbox.moving": "to be brought to host",
  "sandbox.moved": "moved to host",
};

function policy({ data }: Happening): string {
  const internet = data.allow_internet_access === false ? "no Internet" : "the Internet";
  const rules = typeof data.rules === "number" ? data.rules : 0;
  return `to ${internet}${rules ? `, with ${rules} ${rules === 1 ? "rule" : "rules"}` : ""}`;
}

function text({ data }: Happening, name: string): string {
  const value = data[name];
  return typeof value === "string" ? value : "";
}

const PHASES: Record<string, string> = {
  queue: "Until work begins",
  turn: "Until it is its turn",
  template: "Template made ready",
  record: "Journal written",
  disk: "Disk layer made",
  slot: "Network slot taken",
  vmm: "VM monitor started",
  restore: "Memory restored",
  boot: "Kernel and guest started",
  guest: "Guest answered",
  services: "Services started",
  freeze: "VM frozen",
  write: "Memory written",
  end: "Place on the host freed",
  finish: "Tidied up",
  metrics: "Metrics kept",
  move: "Brought to another host",
  refused: "Refused by a host",
  fork: "Children made",
  call: "Way to the host and back",
};

/** A phase in words; one that a newer host tells by its name. */
export function phaseTitle(name: string): string {
  return PHASES[name] ?? name;
}
