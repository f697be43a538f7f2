/** The platform's hosts as they are, and what an administrator does with them. */
import { answer, api } from "$/api/client";
import { Loaded } from "$/lib/loaded.svelte";
import { repeat } from "$/lib/repeat";
import type { Host } from "./host";

// What happens to hosts is told to the platform's own team, which nobody listens for.
const EVERY_MS = 3000;

const at = (id: string) => ({ params: { path: { host_id: id } } });

export class Hosts extends Loaded<Host[]> {
  constructor() {
    super(() => answer(api.GET("/v1/hosts")));
  }

  /** Reads them again and again, unless one may not. Returns what ends that. */
  follow(): () => void {
    return repeat(async () => {
      if (this.error?.status !== 403) await this.load();
    }, EVERY_MS);
  }

  get(id: string): Host | undefined {
    return this.value?.find((each) => each.id === id);
  }

  drain = (host: Host): Promise<void> =>
    this.#change(api.POST("/v1/hosts/{host_id}/drain", at(host.id)));

  undrain = (host: Host): Promise<void> =>
    this.#change(api.POST("/v1/hosts/{host_id}/undrain", at(host.id)));

  revoke = (host: Host): Promise<void> =>
    this.#change(api.POST("/v1/hosts/{host_id}/revoke", at(host.id)));

  delete = (host: Host, force: boolean): Promise<void> =>
    this.#change(
      api.DELETE("/v1/hosts/{host_id}", {
        params: { path: { host_id: host.id }, query: { force } },
      }),
    );

  async #change(call: Parameters<typeof answer>[0]): Promise<void> {
    await answer(call);
    await this.load();
  }
}
