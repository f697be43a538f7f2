import { expect, test } from "vitest";
import { splitName, tagged } from "./names";

test("a name alone is its tag `default`", () => {
  expect(splitName("app")).toEqual({ base: "app", tag: "default" });
  expect(splitName("app:v1")).toEqual({ base: "app", tag: "v1" });
  expect([tagged("app", "default"), tagged("app", "v1")]).toEqual(["app", "app:v1"]);
});
