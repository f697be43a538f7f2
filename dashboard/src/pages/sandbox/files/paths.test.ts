import { expect, test } from "vitest";
import { above, below, crumbs, fault, nameOf } from "./paths";

test("names and directories", () => {
  expect(nameOf("/a/b c")).toBe("b c");
  expect(nameOf("/")).toBe("/");
  expect(above("/a/b")).toBe("/a");
  expect(above("/a")).toBe("/");
  expect(above("/")).toBe("/");
  expect(below("/", "a")).toBe("/a");
  expect(below("/a/", "b/c", "d\n")).toBe("/a/b/c/d\n");
});

test("the way to a path", () => {
  expect(crumbs("/")).toEqual([{ name: "/", path: "/" }]);
  expect(crumbs("//a//<b>/").map((each) => each.path)).toEqual(["/", "/a", "/a/<b>"]);
});

test("what will not do as a name", () => {
  for (const good of ["a", "a/b", ".hidden", "a..b", "é".repeat(127)]) expect(fault(good)).toBe("");
  for (const bad of ["", " ", "/", "..", "a/../b", "./a", "é".repeat(128)]) {
    expect(fault(bad)).not.toBe("");
  }
});
