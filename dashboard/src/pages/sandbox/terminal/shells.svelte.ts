/**
 * The terminals of one sandbox. They stay connected while any tab of the sandbox's page is shown;
 * their shells go on in any case, and are found again by their tags.
 */
import { untrack } from "svelte";
import { on } from "svelte/events";
import { answer, api } from "$/api/client";
import type { Current } from "../current.svelte";
import { Shell, type User } from "./shell.svelte";

const TAG = /^terminal-(root|user)-(\d{1,4})-[a-z0-9]{1,16}$/;
const open = new WeakMap<Current, Shells>();

export class Shells {
  all = $state.raw<Shell[]>([]);
  /** Which is shown. */
  chosen = $state.raw<Shell | null>(null);
  #current: Current;
  #found = false;

  constructor(current: Current) {
    this.#current = current;
    const end = $effect.root(() => {
      const running = $derived(current.running);
      $effect(() => {
        if (running) untrack(() => this.#wake());
        else untrack(() => this.all.forEach((each) => each.sleep()));
      });
      $effect(() => on(window, "online", () => this.#wake()));
      $effect(() => on(document, "visibilitychange", () => this.#wake()));
    });
    current.leaving.add(() => {
      end();
      open.delete(current);
      for (const each of this.all) each.dispose();
    });
  }

  /** Opens one more, and shows it. */
  add(user: User): void {
    const number = Math.max(0, ...this.all.map((each) => each.number)) + 1;
    const tag = `terminal-${user}-${number}-${Math.random().toString(36).slice(2, 10)}`;
    const shell = new Shell(this.#current, tag, number, user, false);
    this.all = [...this.all, shell];
    this.chosen = shell;
  }

  /**
   * Finds those that run in the sandbox and are not here, and how many. Where there is none one is
   * opened, for who comes to the page. Throws ApiError.
   */
  find = async (): Promise<number> => {
    const path = { sandbox_id: this.#current.id };
    const { processes } = await answer(
      api.GET("/v1/sandboxes/{sandbox_id}/processes", { params: { path } }),
    );
    const known = new Set(this.all.map((each) => each.tag));
    const found = processes.flatMap(({ tag }) => {
      const [, user, number] = TAG.exec(tag) ?? [];
      if (!number || known.has(tag)) return [];
      return [new Shell(this.#current, tag, Number(number), user as User, true)];
    });
    this.all = [...this.all, ...found].sort((a, b) => a.number - b.number);
    this.chosen ??= this.all[0] ?? null;
    if (!this.all.length && !this.#found) this.add("root");
    this.#found = true;
    return found.length;
  };

  /** Ends one, and shows its neighbour. Throws ApiError. */
  async close(shell: Shell): Promise<void> {
    await shell.kill();
    const at = this.all.indexOf(shell);
    this.all = this.all.filter((each) => each !== shell);
    if (this.chosen === shell) this.chosen = this.all[Math.max(0, at - 1)] ?? null;
    shell.dispose();
  }

  #wake(): void {
    if (!document.hidden) for (const each of this.all) each.wake();
  }
}

/** Those of the page of one sandbox. */
export function shellsOf(current: Current): Shells {
  const found = open.get(current) ?? new Shells(current);
  open.set(current, found);
  return found;
}
