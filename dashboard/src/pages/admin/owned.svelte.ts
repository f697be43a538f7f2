/** The sandboxes of all teams, with the names of those teams and of their hosts. */
import { answer, api, type Schemas } from "$/api/client";
import { everything, LARGEST_PAGE } from "$/lib/everything";
import { visible } from "$/lib/foreign";
import { Loaded } from "$/lib/loaded.svelte";
import { repeat } from "$/lib/repeat";
import { STATES } from "$/lib/sandboxes.svelte";

export type OwnedSandbox = Schemas["OwnedSandbox"];

// Events are told to the team that they are of.
const EVERY_MS = 5000;

interface Found {
  sandboxes: OwnedSandbox[];
  /** Names by id. */
  teams: Map<string, string>;
  hosts: Map<string, string>;
}

export class Owned extends Loaded<Found> {
  constructor() {
    super(find);
  }

  /**
   * Reads them again and again, unless one may not, or they are so many that it takes several
   * answers. Returns what ends that.
   */
  follow(): () => void {
    return repeat(async () => {
      const large = (this.value?.sandboxes.length ?? 0) > LARGEST_PAGE;
      if (!large && this.error?.status !== 403) await this.load();
    }, EVERY_MS);
  }

  teamName(id: string): string {
    return visible(this.value?.teams.get(id) ?? id);
  }

  hostName(id: string | null): string {
    return id === null ? "" : visible(this.value?.hosts.get(id) ?? id);
  }

  /** What a sandbox can be found by, in lower case. */
  described(sandbox: OwnedSandbox): string {
    const labels = Object.entries(sandbox.metadata).map((pair) => pair.join("="));
    const names = [this.teamName(sandbox.team_id), this.hostName(sandbox.host_id)];
    return [sandbox.id, sandbox.template, ...names, ...labels].join("\n").toLowerCase();
  }
}

async function find(): Promise<Found> {
  const [sandboxes, teams, hosts] = await Promise.all([
    everything((cursor) => {
      const query = { state: [...STATES], limit: LARGEST_PAGE, cursor };
      return answer(api.GET("/v1/admin/sandboxes", { params: { query } }));
    }),
    everything((cursor) => {
      const query = { limit: LARGEST_PAGE, cursor };
      return answer(api.GET("/v1/admin/teams", { params: { query } }));
    }),
    answer(api.GET("/v1/hosts")),
  ]);
  return { sandboxes, teams: names(teams), hosts: names(hosts) };
}

function names(all: { id: string; name: string }[]): Map<string, string> {
  return new Map(all.map((each) => [each.id, each.name]));
}
