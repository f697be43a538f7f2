/** What is asked of the API for a new build, made of what a form holds. */
import type { Schemas } from "$/api/client";
import { tagged } from "./names";

export interface Form {
  name: string;
  tag: string;
  kind: "dockerfile" | "recipe";
  text: string;
  /** Of a recipe: the template that it starts from, or `image` if that is not empty. */
  template: string;
  image: string;
  vcpus: number | null;
  memory: number | null;
  disk: number | null;
  start: string;
  ready: string;
  noCache: boolean;
  /** Of a recipe: nothing but what is written. */
  bare: boolean;
}

/** The request for a build. */
export function newBuild(form: Form): Schemas["NewBuildBody"] {
  const recipe = form.kind === "recipe";
  const image = form.image.trim();
  return {
    name: tagged(form.name.trim(), form.tag.trim() || "default"),
    source: { kind: form.kind, text: written(form), file: recipe ? "recipe" : "Dockerfile" },
    from_image: recipe ? image : "",
    from_template: recipe && !image ? form.template : "",
    vcpus: form.vcpus,
    memory_mb: form.memory,
    disk_size_mb: form.disk,
    no_cache: form.noCache,
    skip_pre_post: recipe && form.bare,
  };
}

/** The text with the two commands as its last lines, so that no other line has another number. */
function written({ kind, text, start, ready }: Form): string {
  const recipe = kind === "recipe";
  const lines = [text.trimEnd()];
  if (start.trim()) lines.push(`${recipe ? "START" : "CMD"} ${start.trim()}`);
  if (ready.trim()) {
    // A recipe's is asked until it succeeds; Docker's own limits would be too short.
    lines.push(
      recipe
        ? `HEALTHCHECK ${ready.trim()}`
        : `HEALTHCHECK --interval=1s --retries=300 CMD ${ready.trim()}`,
    );
  }
  return `${lines.join("\n")}\n`;
}
