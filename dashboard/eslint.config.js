import svelte from "eslint-plugin-svelte";
import ts from "typescript-eslint";
import config from "./svelte.config.js";

export default ts.config(
  { ignores: ["node_modules/", "src/api/schema.d.ts"] },
  ...ts.configs.strict,
  ...svelte.configs.recommended,
  {
    files: ["**/*.svelte", "**/*.svelte.ts"],
    languageOptions: { parserOptions: { parser: ts.parser, svelteConfig: config } },
  },
  {
    rules: {
      // What people, guests and programs wrote is text, never markup.
      "svelte/no-at-html-tags": "error",
      // The content security policy refuses them.
      "svelte/no-inline-styles": ["error", { allowTransitions: true }],
      // That rule knows SvelteKit's router alone.
      "svelte/no-navigation-without-resolve": "off",
      // Not all that a class keeps is shown.
      "svelte/prefer-svelte-reactivity": "off",
    },
  },
);
