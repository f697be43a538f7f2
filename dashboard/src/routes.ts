/** All pages, by path below `/dashboard`. Each is loaded when it is first shown. */
import { createRouter } from "sv-router";
import Shell from "./pages/Shell.svelte";

export const { p, navigate, isActive, route } = createRouter({
  "/login": () => import("./pages/account/Login.svelte"),
  "/signup": () => import("./pages/account/SignUp.svelte"),
  "/": {
    layout: Shell,
    "/": () => import("./pages/sandboxes/Sandboxes.svelte"),
    "/sandboxes": () => import("./pages/sandboxes/Sandboxes.svelte"),
    "/sandboxes/:id": {
      layout: () => import("./pages/sandbox/Sandbox.svelte"),
      "/": () => import("./pages/sandbox/Overview.svelte"),
      "/terminal": () => import("./pages/sandbox/Terminals.svelte"),
      "/files": () => import("./pages/sandbox/Files.svelte"),
      "/processes": () => import("./pages/sandbox/Processes.svelte"),
      "/ports": () => import("./pages/sandbox/Ports.svelte"),
      "/history": () => import("./pages/sandbox/History.svelte"),
    },
    "/templates": () => import("./pages/templates/Templates.svelte"),
    "/builds": () => import("./pages/templates/Builds.svelte"),
    "/builds/:id": () => import("./pages/templates/Build.svelte"),
    "/keys": () => import("./pages/team/Keys.svelte"),
    "/team": () => import("./pages/team/Team.svelte"),
    "/notifications": () => import("./pages/team/Notifications.svelte"),
    "/audit": () => import("./pages/team/Audit.svelte"),
    "/usage": () => import("./pages/team/Usage.svelte"),
    "/settings": () => import("./pages/account/Settings.svelte"),
    "/admin/hosts": () => import("./pages/admin/Hosts.svelte"),
    "/admin/teams": () => import("./pages/admin/Teams.svelte"),
    "/admin/users": () => import("./pages/admin/Users.svelte"),
    "/admin/sandboxes": () => import("./pages/admin/Sandboxes.svelte"),
    "/admin/templates": () => import("./pages/admin/Templates.svelte"),
    "/admin/audit": () => import("./pages/admin/Audit.svelte"),
  },
  "*": () => import("./pages/NotFound.svelte"),
});
