import { expect, test } from "vitest";
import { pieces, visible } from "./foreign";

test("what is not seen is shown by its number", () => {
  expect(visible("exe\u202etxt.gpj")).toBe("exe⟨U+202E⟩txt.gpj");
  expect(visible("a\u0000b\u001b[31m\u200b\ufeff")).toBe("a⟨U+0000⟩b⟨U+001B⟩[31m⟨U+200B⟩⟨U+FEFF⟩");
  expect(visible("tag\u{e0041}")).toBe("tag⟨U+E0041⟩");
});

test("all else stays as it is, markup too", () => {
  for (const text of ["", "<b>bold</b>", "עברית and 日本語", "🐦‍⬛".replace("\u200d", "")]) {
    expect(visible(text)).toBe(text);
    expect(
      pieces(text)
        .map((each) => each.text)
        .join(""),
    ).toBe(text);
  }
});

test("pieces say which of them stand for something", () => {
  expect(pieces("\u202ea\u2066")).toEqual([
    { text: "⟨U+202E⟩", unseen: true },
    { text: "a", unseen: false },
    { text: "⟨U+2066⟩", unseen: true },
  ]);
});
