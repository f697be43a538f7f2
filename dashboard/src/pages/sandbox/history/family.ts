/** Sandboxes and the forks that were made of them, as a tree. */
import type { Sandbox } from "$/lib/sandboxes.svelte";

export interface Member {
  id: string;
  /** Null when it is over: of such no more is known than its id. */
  sandbox: Sandbox | null;
  /** Oldest first. */
  forks: Member[];
}

/** The whole family of a sandbox, from the eldest that is known. */
export function familyOf(id: string, all: Iterable<Sandbox>): Member {
  const known = new Map<string, Sandbox>();
  const forks = new Map<string, Sandbox[]>();
  for (const each of all) {
    known.set(each.id, each);
    if (!each.parent_id) continue;
    const siblings = forks.get(each.parent_id);
    if (siblings) siblings.push(each);
    else forks.set(each.parent_id, [each]);
  }
  let eldest = id;
  for (let above = known.get(id)?.parent_id; above; above = known.get(above)?.parent_id) {
    eldest = above;
  }
  return member(eldest);

  function member(id: string): Member {
    const found = forks.get(id) ?? [];
    return {
      id,
      sandbox: known.get(id) ?? null,
      forks: found
        .sort((a, b) => a.created_at - b.created_at || a.id.localeCompare(b.id))
        .map((each) => member(each.id)),
    };
  }
}

/** The sandboxes of a family that are not over. */
export function living(family: Member): Sandbox[] {
  return [...(family.sandbox ? [family.sandbox] : []), ...family.forks.flatMap(living)];
}
