import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vite";

// Where the control plane serves it from; see src/sandmartin/control/web.py.
const OUT = "../src/sandmartin/control/web";
const SERVER = process.env.SANDMARTIN_URL ?? "http://127.0.0.1:8080";

export default defineConfig({
  base: "/dashboard/",
  plugins: [svelte()],
  resolve: { alias: { $: new URL("./src", import.meta.url).pathname } },
  build: {
    outDir: OUT,
    emptyOutDir: true,
    target: "es2022",
    // The content security policy has no room for what is written into the page.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    chunkSizeWarningLimit: 700,
  },
  server: {
    proxy: {
      "^/(v1|auth|sandbox)/": { target: SERVER, ws: true },
    },
  },
});
