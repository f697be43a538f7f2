/**
 * The page's content security policy lets in no style that a script makes, unless it carries the
 * nonce of the page, and no `style` attribute. The terminal's library makes both. Its option
 * `documentOverride` is not asked everywhere, so the document itself makes elements as the policy
 * allows them.
 */

const nonce = document.querySelector<HTMLMetaElement>('meta[name="style-nonce"]')?.content ?? "";

/** From now on styles carry the nonce, and attributes `style` of a span become properties. */
export function allowStyles(): void {
  const createElement = document.createElement.bind(document);
  document.createElement = (name: string, options?: ElementCreationOptions): HTMLElement => {
    const made = createElement(name, options);
    if (name === "style") made.nonce = nonce;
    else if (name === "span") made.setAttribute = setAttribute;
    return made;
  };
}

function setAttribute(this: HTMLElement, name: string, value: string): void {
  if (name === "style") this.style.cssText = value;
  else Element.prototype.setAttribute.call(this, name, value);
}
