/** Short messages at the edge of the page: what was done, and what failed. */
import { ApiError } from "../api/client";

export interface Toast {
  id: number;
  text: string;
  error: ApiError | null;
}

const SHOWN_MS = 5000;

class Toasts {
  all = $state.raw<Toast[]>([]);
  #next = 1;

  /** Says that something is done; it goes by itself. */
  say(text: string): void {
    const id = this.#add(text, null);
    setTimeout(() => this.drop(id), SHOWN_MS);
  }

  /** Says what failed; it stays until it is closed. */
  fail(thrown: unknown): void {
    const error = ApiError.of(thrown);
    this.#add(error.message, error);
  }

  drop(id: number): void {
    this.all = this.all.filter((each) => each.id !== id);
  }

  #add(text: string, error: ApiError | null): number {
    const id = this.#next++;
    this.all = [...this.all, { id, text, error }].slice(-4);
    return id;
  }
}

export const toasts = new Toasts();
