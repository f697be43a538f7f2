/** What a host's figures mean. */
import type { Schemas } from "$/api/client";
import { mebibytes } from "$/lib/format";

export type Host = Schemas["HostBody"];

/** It is the machine of the control plane itself, and ends with it. */
export const isOwn = (host: Host): boolean => host.address.startsWith("unix:");

/** What its sandboxes run with, and what that means. */
export function acceleration(host: Host): string {
  if (host.accel === "kvm") return "KVM";
  if (host.accel === "tcg") return "emulation";
  return host.accel || "not known";
}

/** What of it sandboxes may have, and what they have. */
export function capacity(host: Host) {
  const vcpus = host.cpus * host.cpu_overcommit;
  const memory = host.used_memory_mb + host.running * host.memory_overhead_mb;
  return {
    vcpus: {
      used: host.used_vcpus,
      of: vcpus,
      text: `${host.used_vcpus} of ${vcpus.toLocaleString()}`,
    },
    memory: {
      used: memory,
      of: host.memory_mb,
      text: `${mebibytes(memory)} of ${mebibytes(host.memory_mb)}`,
    },
  };
}

/** Why a host that is not online is not, as far as can be told; empty for one that is. */
export function trouble(host: Host): string {
  if (host.status === "pending") {
    return "It has not registered yet. Its token works once and within an hour; make a new one if it is lost.";
  }
  if (host.status !== "unreachable") return "";
  if (!isOwn(host) && host.certificate_expires_at === null) {
    return "Its certificates were revoked. With a new token it can register again.";
  }
  if ((host.heartbeat_at ?? 0) > (host.reached_at ?? 0) + 60) {
    return "It sends heartbeats, but cannot be reached at its address: look at firewalls and at what it advertises.";
  }
  return "Neither is it heard of nor can it be reached: see whether the machine and its agent run.";
}
