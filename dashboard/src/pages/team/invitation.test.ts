import { expect, test } from "vitest";
import { tokenOf } from "./invitation";

test("a token is taken out of the link it came in", () => {
  expect(tokenOf(" https://bank.example/dashboard/signup#invitation=aB-_9 \n")).toBe("aB-_9");
  expect(tokenOf("aB-_9\n")).toBe("aB-_9");
  expect(tokenOf("")).toBe("");
});
