import { expect, test } from "vitest";
import { acceleration, capacity, trouble, type Host } from "./host";

const HOST: Host = {
  id: "h1",
  name: "one",
  address: "https://10.0.0.7:7443",
  status: "online",
  draining: false,
  created_at: 0,
  heartbeat_at: 1000,
  reached_at: 1000,
  certificate_expires_at: 5000,
  cpus: 4,
  memory_mb: 8192,
  disk_free_mb: 1024,
  cpu_overcommit: 2.5,
  memory_overhead_mb: 64,
  accel: "kvm",
  vmm_version: "",
  version: "",
  running: 2,
  paused: 0,
  used_vcpus: 3,
  used_memory_mb: 1024,
};

test("what sandboxes take counts with what each takes beside its memory", () => {
  const { vcpus, memory } = capacity(HOST);
  expect(vcpus).toEqual({ used: 3, of: 10, text: "3 of 10" });
  expect(memory).toEqual({ used: 1152, of: 8192, text: "1.1 GiB of 8 GiB" });
});

test("emulation is called so", () => {
  expect(acceleration(HOST)).toBe("KVM");
  expect(acceleration({ ...HOST, accel: "tcg" })).toBe("emulation");
  expect(acceleration({ ...HOST, accel: "" })).toBe("not known");
});

test("a host that is away tells as much of the reason as is known", () => {
  const away: Host = { ...HOST, status: "unreachable" };
  expect(trouble(HOST)).toBe("");
  expect(trouble({ ...HOST, status: "pending" })).toContain("has not registered");
  expect(trouble({ ...away, certificate_expires_at: null })).toContain("revoked");
  expect(trouble({ ...away, heartbeat_at: 2000 })).toContain("sends heartbeats");
  expect(trouble(away)).toContain("see whether the machine");
});
