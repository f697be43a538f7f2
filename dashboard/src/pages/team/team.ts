/** The team that is acted for, in calls; and how one parts from it. */
import { answer, api, type Schemas } from "$/api/client";
import { session } from "$/lib/session.svelte";

export type Member = Schemas["MemberBody"];

/** The team's id, as a parameter of its routes. */
export const thisTeam = (): { team_id: string } => ({ team_id: session.me?.team_id ?? "" });

export const listMembers = (): Promise<Member[]> =>
  answer(api.GET("/v1/teams/{team_id}/members", { params: { path: thisTeam() } }));

/** How a member is called. */
export const called = (member: Member): string => member.name || member.email;

/**
 * Leaves or ends the team that is acted for, by `work`. Sessions that act for a team end with the
 * membership, so this one acts for another team first. Without another one it ends.
 */
export async function depart(work: () => Promise<unknown>): Promise<void> {
  const from = session.me?.team_id ?? "";
  const to = session.me?.teams.find((each) => each.id !== from)?.id;
  if (to) await act(to);
  try {
    await work();
  } catch (thrown) {
    if (to) await act(from);
    throw thrown;
  }
  await session.find();
  session.events.forget();
}

const act = (teamId: string): Promise<unknown> =>
  answer(api.POST("/v1/auth/switch-team", { body: { team_id: teamId } }));
