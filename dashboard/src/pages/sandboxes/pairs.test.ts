import { expect, test } from "vitest";
import { parsePairs } from "./pairs";

test("each line is a name and a value", () => {
  const { pairs, error } = parsePairs("a=1\n\n b =x=y\n__proto__=p\n");
  expect(error).toBe("");
  expect(Object.entries(pairs)).toEqual([
    ["a", "1"],
    ["b", "x=y"],
    ["__proto__", "p"],
  ]);
});

test("a line that is none is told by its number", () => {
  expect(parsePairs("a=1\nb").error).toBe("Line 2 is not name=value");
  expect(parsePairs("=1").error).toBe("Line 1 is not name=value");
});
