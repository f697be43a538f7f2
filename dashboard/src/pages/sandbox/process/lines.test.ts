import { expect, test } from "vitest";
import { plain, tail } from "./lines";

test("lines and tabs stay, colours go, what is not seen is shown", () => {
  expect(plain("a\tb\r\n\u001b[1;31mred\u001b[0m\n")).toBe("a\tb\nred\n");
  expect(plain("<b>\u202egnp.exe\u0007")).toBe("<b>⟨U+202E⟩gnp.exe⟨U+0007⟩");
  expect(plain("\u001b]0;title\u0007")).toBe("⟨U+001B⟩]0;title⟨U+0007⟩");
});

test("of much text the end is kept, from the beginning of a line", () => {
  expect(tail("one\ntwo\nthree", 100)).toBe("one\ntwo\nthree");
  expect(tail("one\ntwo\nthree", 7)).toBe("three");
  expect(tail("onetwothree", 5)).toBe("three");
});
