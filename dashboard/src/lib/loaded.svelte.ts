/** What a page shows that has to be asked for first: its value, its error, and asking again. */
import { ApiError } from "../api/client";

export class Loaded<T> {
  value = $state.raw<T | undefined>(undefined);
  error = $state.raw<ApiError | null>(null);
  loading = $state(false);
  #ask: () => Promise<T>;
  #asked = 0;

  /** `ask` is called by `load`; `until` is there before the first answer. */
  constructor(ask: () => Promise<T>, until?: T) {
    this.#ask = ask;
    this.value = until;
  }

  /** Asks; of several at once the last counts. What was there stays until then. */
  load = async (): Promise<void> => {
    const asked = ++this.#asked;
    this.loading = true;
    try {
      const value = await this.#ask();
      if (asked === this.#asked) [this.value, this.error] = [value, null];
    } catch (thrown) {
      if (asked === this.#asked) this.error = ApiError.of(thrown);
    } finally {
      if (asked === this.#asked) this.loading = false;
    }
  };
}

/** Something that a button or a form does: whether it is under way, and why it failed. */
export class Doing {
  busy = $state(false);
  error = $state.raw<ApiError | null>(null);

  /** Does it, unless it is being done. Returns whether it succeeded. */
  async run(work: () => Promise<unknown>): Promise<boolean> {
    if (this.busy) return false;
    this.busy = true;
    this.error = null;
    try {
      await work();
      return true;
    } catch (thrown) {
      this.error = ApiError.of(thrown);
      return false;
    } finally {
      this.busy = false;
    }
  }
}
