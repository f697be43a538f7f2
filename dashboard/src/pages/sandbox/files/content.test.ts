import { expect, test } from "vitest";
import { dump, pictureType, tell } from "./content";

const bytes = (text: string): Uint8Array => new TextEncoder().encode(text);
const PNG = Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a, 0);

test("pictures are known by their bytes", () => {
  expect(pictureType(PNG)).toBe("image/png");
  expect(pictureType(Uint8Array.of(0xff, 0xd8, 0xff, 0xe0))).toBe("image/jpeg");
  expect(pictureType(bytes("GIF89a"))).toBe("image/gif");
  expect(pictureType(bytes("RIFF1234WEBPVP8 "))).toBe("image/webp");
  for (const other of ["", "GIF8", "RIFF1234", "<svg xmlns='x'/>", "<html>", "RIFF1234WAVE"]) {
    expect(pictureType(bytes(other))).toBe("");
  }
});

test("text is what decodes and has no NUL", () => {
  expect(tell(bytes("<script>\r\n"), true)).toEqual({ kind: "text", text: "<script>\r\n" });
  expect(tell(bytes("\ufeffa"), true)).toEqual({ kind: "text", text: "\ufeffa" });
  expect(tell(bytes(""), true)).toEqual({ kind: "text", text: "" });
  expect(tell(bytes("a\0"), true)).toEqual({ kind: "binary" });
  expect(tell(Uint8Array.of(0xff, 0xfe), true)).toEqual({ kind: "binary" });
  const cut = bytes("aé").subarray(0, 2);
  expect(tell(cut, false)).toEqual({ kind: "text", text: "a" });
  expect(tell(cut, true)).toEqual({ kind: "binary" });
});

test("a dump has a line for each sixteen bytes", () => {
  const lines = dump(Uint8Array.from({ length: 18 }, (_, at) => 0x40 + at)).split("\n");
  expect(lines[0]).toBe(
    "000000  40 41 42 43 44 45 46 47 48 49 4a 4b 4c 4d 4e 4f  @ABCDEFGHIJKLMNO",
  );
  expect(lines[1]?.startsWith("000010  50 51 ")).toBe(true);
  expect(lines[1]?.endsWith("  PQ")).toBe(true);
});
