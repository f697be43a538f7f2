import { expect, test } from "vitest";
import { newBuild, type Form } from "./request";

const FORM: Form = {
  name: "app",
  tag: "",
  kind: "dockerfile",
  text: "FROM base\nRUN true\n\n",
  template: "base",
  image: "",
  vcpus: null,
  memory: 256,
  disk: null,
  start: "",
  ready: "",
  noCache: false,
  bare: true,
};

test("a Dockerfile says itself what it starts from", () => {
  const asked = newBuild(FORM);
  expect(asked.name).toBe("app");
  expect(asked.source).toEqual({
    kind: "dockerfile",
    text: "FROM base\nRUN true\n",
    file: "Dockerfile",
  });
  expect([asked.from_template, asked.from_image, asked.skip_pre_post]).toEqual(["", "", false]);
});

test("a recipe starts from a template or an image", () => {
  const recipe: Form = { ...FORM, kind: "recipe", text: "RUN true", tag: "v1" };
  expect(newBuild(recipe)).toMatchObject({ name: "app:v1", from_template: "base", from_image: "" });
  expect(newBuild({ ...recipe, image: "docker.io/library/debian:12" })).toMatchObject({
    from_template: "",
    from_image: "docker.io/library/debian:12",
    skip_pre_post: true,
  });
});

test("the commands are the last lines, in the words of each language", () => {
  const commands = { start: " serve ", ready: "curl localhost" };
  expect(newBuild({ ...FORM, ...commands }).source.text).toBe(
    "FROM base\nRUN true\nCMD serve\nHEALTHCHECK --interval=1s --retries=300 CMD curl localhost\n",
  );
  expect(newBuild({ ...FORM, ...commands, kind: "recipe" }).source.text).toBe(
    "FROM base\nRUN true\nSTART serve\nHEALTHCHECK curl localhost\n",
  );
});
