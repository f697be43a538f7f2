/** The text editor, as this page has it: CodeMirror with the page's colours. */
import { HighlightStyle, LanguageSupport, syntaxHighlighting } from "@codemirror/language";
import { EditorState, type Extension } from "@codemirror/state";
import { tags } from "@lezer/highlight";
import { EditorView, basicSetup } from "codemirror";
import { languageOf } from "./languages";

export interface Options {
  text: string;
  /** Of the file; it tells the language. */
  name: string;
  /** What it is called for those who hear the page. */
  label: string;
  readonly: boolean;
  /** Told after each change whether the text differs from what was last `saved`. */
  onchange: (changed: boolean) => void;
}

/** Longer lines are not wrapped: to measure them takes too long. */
const LONGEST_WRAPPED = 5000;

export class Editor {
  #view: EditorView;
  #saved: EditorState["doc"];

  constructor(parent: HTMLElement, options: Options, language: LanguageSupport | null) {
    this.#view = new EditorView({ parent, state: stateOf(options, language, () => this.#saved) });
    this.#saved = this.#view.state.doc;
  }

  /** The text, its lines ending as they did. */
  get text(): string {
    return this.#view.state.sliceDoc();
  }

  /** What is there now is what was saved, unless more was typed since `text` was. */
  saved(text: string): boolean {
    this.#saved = this.#view.state.toText(text);
    return this.#saved.eq(this.#view.state.doc);
  }

  destroy(): void {
    this.#view.destroy();
  }
}

/** Makes an editor inside of an element, once the file's language is loaded. */
export async function open(parent: HTMLElement, options: Options): Promise<Editor> {
  return new Editor(parent, options, await languageOf(options.name));
}

function stateOf(
  { text, label, readonly, onchange }: Options,
  language: LanguageSupport | null,
  saved: () => EditorState["doc"],
): EditorState {
  const lines = text.split("\n");
  const dos = lines.length > 1 && lines.slice(0, -1).every((line) => line.endsWith("\r"));
  const wrapped = lines.every((line) => line.length <= LONGEST_WRAPPED);
  return EditorState.create({
    doc: text,
    extensions: [
      basicSetup,
      // Without it all kinds of ends would become one; what is pasted gets those of the file.
      EditorState.lineSeparator.of(dos ? "\r\n" : "\n"),
      EditorView.clipboardInputFilter.of((pasted, state) =>
        pasted.replace(/\r\n?|\n/g, state.lineBreak),
      ),
      EditorState.readOnly.of(readonly),
      EditorView.cspNonce.of(nonce()),
      EditorView.contentAttributes.of({ "aria-label": label, tabindex: "0" }),
      EditorView.updateListener.of((update) => {
        if (update.docChanged) onchange(!update.state.doc.eq(saved()));
      }),
      wrapped ? EditorView.lineWrapping : [],
      language ?? [],
      LOOK,
    ],
  });
}

/** Of the styles that this page's policy lets in. */
function nonce(): string {
  return document.querySelector<HTMLMetaElement>('meta[name="style-nonce"]')?.content ?? "";
}

const COLOURS = HighlightStyle.define([
  { tag: [tags.keyword, tags.operatorKeyword, tags.modifier], color: "var(--info)" },
  { tag: [tags.string, tags.special(tags.string), tags.regexp], color: "var(--good)" },
  { tag: [tags.number, tags.bool, tags.null, tags.atom, tags.escape], color: "var(--warn)" },
  { tag: [tags.comment, tags.meta], color: "var(--muted)", fontStyle: "italic" },
  { tag: [tags.typeName, tags.className, tags.tagName, tags.namespace], color: "var(--accent)" },
  { tag: [tags.attributeName, tags.propertyName], color: "var(--accent)" },
  { tag: [tags.definition(tags.variableName), tags.heading, tags.strong], fontWeight: "600" },
  { tag: tags.emphasis, fontStyle: "italic" },
  { tag: [tags.link, tags.url], textDecoration: "underline" },
  { tag: tags.invalid, color: "var(--danger)" },
]);

const LOOK: Extension = [
  syntaxHighlighting(COLOURS),
  EditorView.theme({
    "&": { backgroundColor: "var(--surface)", color: "var(--text)", maxHeight: "70vh" },
    // What is around it has one.
    "&.cm-focused": { outline: "none" },
    ".cm-scroller": { fontFamily: "var(--mono)", fontSize: "0.8125rem", lineHeight: "1.5" },
    ".cm-content, .cm-gutter": { minHeight: "12rem" },
    ".cm-content": { caretColor: "var(--text)" },
    ".cm-cursor, .cm-dropCursor": { borderLeftColor: "var(--text)" },
    ".cm-gutters": {
      backgroundColor: "var(--sunken)",
      color: "var(--muted)",
      borderRight: "1px solid var(--line)",
    },
    ".cm-activeLine": { backgroundColor: "transparent" },
    ".cm-activeLineGutter": { backgroundColor: "var(--hover)", color: "var(--text)" },
    "&.cm-focused > .cm-scroller > .cm-selectionLayer .cm-selectionBackground, .cm-selectionBackground":
      { background: "var(--accent-soft)" },
    ".cm-selectionMatch": { backgroundColor: "var(--info-soft)" },
    ".cm-searchMatch": { backgroundColor: "var(--warn-soft)" },
    ".cm-searchMatch-selected": { backgroundColor: "var(--accent-soft)" },
    "&.cm-focused .cm-matchingBracket": { backgroundColor: "var(--info-soft)" },
    "&.cm-focused .cm-nonmatchingBracket": { backgroundColor: "var(--danger-soft)" },
    ".cm-foldPlaceholder, .cm-panels, .cm-tooltip": {
      backgroundColor: "var(--raised)",
      color: "var(--text)",
      borderColor: "var(--line)",
    },
    ".cm-panels-bottom": { borderTop: "1px solid var(--line)" },
    ".cm-panel.cm-search .cm-textfield": {
      width: "12rem",
      maxWidth: "100%",
      background: "var(--surface)",
      borderColor: "var(--line-strong)",
    },
    ".cm-panel.cm-search [name=close]": { color: "var(--text)", cursor: "pointer" },
    ".cm-panel.cm-search .cm-button": {
      background: "var(--surface)",
      border: "1px solid var(--line-strong)",
      color: "var(--text)",
    },
    ".cm-tooltip-autocomplete > ul > li[aria-selected]": {
      backgroundColor: "var(--accent)",
      color: "var(--on-accent)",
    },
    ".cm-completionIcon": { display: "none" },
    ".cm-specialChar": { color: "var(--warn)" },
  }),
];
