import { expect, test } from "vitest";
import { givenBy, mayActOn, ROLES } from "./roles";

test("owners act on all, admins on members, members on nobody", () => {
  expect(ROLES.map((over) => mayActOn("owner", over))).toEqual([true, true, true]);
  expect(ROLES.map((over) => mayActOn("admin", over))).toEqual([true, false, false]);
  expect(ROLES.map((over) => mayActOn("member", over))).toEqual([false, false, false]);
  expect(mayActOn(null, "member")).toBe(false);
});

test("nobody gives more than they have", () => {
  expect(givenBy("owner")).toEqual(["member", "admin", "owner"]);
  expect(givenBy("admin")).toEqual(["member", "admin"]);
  expect(givenBy("member")).toEqual([]);
  expect(givenBy(undefined)).toEqual([]);
});
