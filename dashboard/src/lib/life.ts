/** What can be done with a sandbox, by its state, and the calls that do it. */
import { answer, api } from "../api/client";
import type { Sandbox } from "./sandboxes.svelte";

export const canPause = (sandbox: Sandbox): boolean => sandbox.status === "running";
export const canResume = (sandbox: Sandbox): boolean => sandbox.status === "paused";
export const canCopy = (sandbox: Sandbox): boolean => sandbox.status === "running";
export const canSnapshot = (sandbox: Sandbox): boolean =>
  sandbox.status === "running" || sandbox.status === "paused";
export const canDestroy = (sandbox: Sandbox): boolean => sandbox.status !== "stopping";

const at = (id: string) => ({ params: { path: { sandbox_id: id } } });

export const pause = (id: string): Promise<Sandbox> =>
  answer(api.POST("/v1/sandboxes/{sandbox_id}/pause", at(id)));

export const resume = (id: string): Promise<Sandbox> =>
  answer(api.POST("/v1/sandboxes/{sandbox_id}/resume", at(id)));

export const destroy = (id: string): Promise<unknown> =>
  answer(api.DELETE("/v1/sandboxes/{sandbox_id}", at(id)));
