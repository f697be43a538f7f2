/** Who may do what to whom in a team, as `docs/accounts.md` has it. */
import type { Schemas } from "$/api/client";

export type Role = Schemas["Role"];

/** From the least to the most that one may do. */
export const ROLES: readonly Role[] = ["member", "admin", "owner"];

/** Whether one with a role may change or remove a member that has another. */
export function mayActOn(mine: Role | null | undefined, over: Role): boolean {
  return mine === "owner" || (mine === "admin" && over === "member");
}

/** The roles that one with a role may give. */
export function givenBy(mine: Role | null | undefined): readonly Role[] {
  if (mine === "owner") return ROLES;
  return mine === "admin" ? ROLES.slice(0, 2) : [];
}
