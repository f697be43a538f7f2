/** The audit log, as the API gives it, and the words in it. */
import type { Schemas } from "$/api/client";

export type AuditPage = Schemas["AuditPage"];

export interface AuditQuery {
  /** `next` of the page before. */
  before?: number | null;
  action?: string;
  resource_type?: string;
}

/** Kinds of objects that something is done to. */
export const OBJECTS = [
  "build",
  "channel",
  "host",
  "invitation",
  "key",
  "member",
  "sandbox",
  "team",
  "template",
  "user",
] as const;

/** Actions that are suggested; others can be typed. */
export const ACTIONS = [
  "build.cancelled",
  "build.created",
  "channel.changed",
  "channel.configured",
  "channel.created",
  "channel.deleted",
  "checkpoint.created",
  "checkpoint.deleted",
  "invitation.withdrawn",
  "key.created",
  "key.revoked",
  "member.invited",
  "member.joined",
  "member.left",
  "member.removed",
  "member.role_changed",
  "sandbox.created",
  "sandbox.destroyed",
  "sandbox.forked",
  "sandbox.paused",
  "sandbox.resumed",
  "sandbox.rolled_back",
  "sandbox.timeout_set",
  "team.created",
  "team.deleted",
  "team.quotas_set",
  "team.renamed",
  "template.built",
  "template.created",
  "template.deleted",
  "user.logged_in",
  "user.logged_out",
] as const;
