import { expect, test } from "vitest";
import type { Sandbox } from "$/lib/sandboxes.svelte";
import { familyOf, living, type Member } from "./family";

function sandbox(id: string, parent: string | null, created_at = 0): Sandbox {
  return { id, parent_id: parent, created_at } as Sandbox;
}

/** `a(b c(d))`, with a `-` for one that is over. */
function drawn({ id, sandbox, forks }: Member): string {
  const below = forks.length ? `(${forks.map(drawn).join(" ")})` : "";
  return `${sandbox ? "" : "-"}${id}${below}`;
}

test("a family is found from each of its members", () => {
  const all = [
    sandbox("d", "c", 3),
    sandbox("c", "a", 2),
    sandbox("b", "a", 1),
    sandbox("a", null),
    sandbox("other", null),
    sandbox("theirs", "other"),
  ];
  for (const id of ["a", "b", "c", "d"]) expect(drawn(familyOf(id, all))).toBe("a(b c(d))");
  expect(living(familyOf("d", all)).map((each) => each.id)).toEqual(["a", "b", "c", "d"]);
});

test("one whose parent is over has its siblings still", () => {
  const all = [sandbox("b", "a", 1), sandbox("c", "a", 2), sandbox("d", "c")];
  expect(drawn(familyOf("d", all))).toBe("-a(b c(d))");
  expect(drawn(familyOf("alone", []))).toBe("-alone");
});
