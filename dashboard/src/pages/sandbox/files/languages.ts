/** Languages that the editor knows, by the names of files. Each is loaded when it is needed. */
import { LanguageSupport, StreamLanguage, type StreamParser } from "@codemirror/language";

type Load = () => Promise<LanguageSupport>;

const javascript =
  (options: { jsx?: boolean; typescript?: boolean } = {}): Load =>
  async () =>
    (await import("@codemirror/lang-javascript")).javascript(options);

/** One of the older kind. */
const legacy =
  (load: () => Promise<StreamParser<unknown>>): Load =>
  async () =>
    new LanguageSupport(StreamLanguage.define(await load()));

const css: Load = async () => (await import("@codemirror/lang-css")).css();
const html: Load = async () => (await import("@codemirror/lang-html")).html();
const json: Load = async () => (await import("@codemirror/lang-json")).json();
const markdown: Load = async () => (await import("@codemirror/lang-markdown")).markdown();
const python: Load = async () => (await import("@codemirror/lang-python")).python();
const yaml: Load = async () => (await import("@codemirror/lang-yaml")).yaml();
const shell = legacy(async () => (await import("@codemirror/legacy-modes/mode/shell")).shell);
const c = legacy(async () => (await import("@codemirror/legacy-modes/mode/clike")).c);
const cpp = legacy(async () => (await import("@codemirror/legacy-modes/mode/clike")).cpp);
const java = legacy(async () => (await import("@codemirror/legacy-modes/mode/clike")).java);
const xml = legacy(async () => (await import("@codemirror/legacy-modes/mode/xml")).xml);
const properties = legacy(
  async () => (await import("@codemirror/legacy-modes/mode/properties")).properties,
);

const BY_ENDING: Record<string, Load> = {
  bash: shell,
  c,
  cc: cpp,
  cfg: properties,
  conf: properties,
  cpp,
  css,
  diff: legacy(async () => (await import("@codemirror/legacy-modes/mode/diff")).diff),
  go: legacy(async () => (await import("@codemirror/legacy-modes/mode/go")).go),
  h: c,
  htm: html,
  html,
  ini: properties,
  java,
  js: javascript(),
  json,
  jsx: javascript({ jsx: true }),
  lua: legacy(async () => (await import("@codemirror/legacy-modes/mode/lua")).lua),
  md: markdown,
  mjs: javascript(),
  patch: legacy(async () => (await import("@codemirror/legacy-modes/mode/diff")).diff),
  pl: legacy(async () => (await import("@codemirror/legacy-modes/mode/perl")).perl),
  py: python,
  rb: legacy(async () => (await import("@codemirror/legacy-modes/mode/ruby")).ruby),
  rs: legacy(async () => (await import("@codemirror/legacy-modes/mode/rust")).rust),
  sh: shell,
  sql: legacy(async () => (await import("@codemirror/legacy-modes/mode/sql")).standardSQL),
  svg: xml,
  toml: legacy(async () => (await import("@codemirror/legacy-modes/mode/toml")).toml),
  ts: javascript({ typescript: true }),
  tsx: javascript({ jsx: true, typescript: true }),
  xml,
  yaml,
  yml: yaml,
};

const BY_NAME: Record<string, Load> = {
  ".bash_profile": shell,
  ".bashrc": shell,
  ".profile": shell,
  Dockerfile: legacy(
    async () => (await import("@codemirror/legacy-modes/mode/dockerfile")).dockerFile,
  ),
};

/** The language of a file of that name, or null when none is known. */
export async function languageOf(name: string): Promise<LanguageSupport | null> {
  const ending = name.includes(".") ? name.slice(name.lastIndexOf(".") + 1).toLowerCase() : "";
  const load = find(BY_NAME, name) ?? find(BY_ENDING, ending);
  return load ? await load() : null;
}

/** Names come from a sandbox: one may be `constructor`. */
function find(table: Record<string, Load>, name: string): Load | undefined {
  return Object.hasOwn(table, name) ? table[name] : undefined;
}
