import { expect, test } from "vitest";
import { everything } from "./everything";

test("all pages are read, in their order", async () => {
  const pages: Record<string, { items: number[]; next: string }> = {
    "": { items: [1, 2], next: "b" },
    b: { items: [3], next: "c" },
    c: { items: [], next: "" },
  };
  const asked: string[] = [];
  const found = await everything(async (cursor) => {
    asked.push(cursor);
    return pages[cursor] ?? { items: [], next: "" };
  });
  expect(found).toEqual([1, 2, 3]);
  expect(asked).toEqual(["", "b", "c"]);
});
