/** Light, dark, or as the system has it. */

export type Theme = "system" | "light" | "dark";
const KEY = "sandmartin.theme";

class Themes {
  chosen = $state<Theme>(stored());

  constructor() {
    this.#show();
  }

  choose(theme: Theme): void {
    this.chosen = theme;
    try {
      localStorage.setItem(KEY, theme);
    } catch {
      // Where the browser keeps nothing the choice lasts as long as the page.
    }
    this.#show();
  }

  #show(): void {
    document.documentElement.dataset.theme = this.chosen;
  }
}

function stored(): Theme {
  try {
    const found = localStorage.getItem(KEY);
    return found === "light" || found === "dark" ? found : "system";
  } catch {
    return "system";
  }
}

export const themes = new Themes();
