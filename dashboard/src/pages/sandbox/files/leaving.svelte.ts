/** Changes that are not saved: whoever leaves them is asked first. */

export class Leaving {
  /** There are such changes. */
  changed = $state(false);
  /** It is being asked. */
  asking = $state(false);
  #answer: (leave: boolean) => void = () => {};

  /** Whether one may go; asks if something would be lost. */
  ask = (): boolean | Promise<boolean> => {
    if (!this.changed) return true;
    this.#answer(false);
    this.asking = true;
    return new Promise((resolve) => (this.#answer = resolve));
  };

  answer(leave: boolean): void {
    this.asking = false;
    if (leave) this.changed = false;
    this.#answer(leave);
  }
}
