import { expect, test } from "vitest";
import { agentCommand, isLoopback } from "./command";

const CONTROL = new URL("https://control.example/dashboard");

test("the command has the token in its environment", () => {
  expect(agentCommand(CONTROL, "smr_x.y", "10.0.0.7")).toBe(
    "SANDMARTIN_HOST_TOKEN=smr_x.y sandmartin agent --control https://control.example --listen 10.0.0.7:7443",
  );
});

test("plain HTTP to another machine has to be allowed", () => {
  expect(agentCommand(new URL("http://10.0.0.1:8080"), "t", "a")).toContain(" --insecure-control");
  const own = new URL("http://127.0.0.1:8080");
  expect(isLoopback(own)).toBe(true);
  expect(agentCommand(own, "t", "a")).not.toContain("--insecure-control");
});

test("an address is one word of the command", () => {
  expect(agentCommand(CONTROL, "t", "")).toContain("--listen ADDRESS:7443");
  expect(agentCommand(CONTROL, "t", "fd00::7")).toContain("--listen '[fd00::7]:7443'");
  expect(agentCommand(CONTROL, "t", "a; rm 'b'")).toContain("--listen 'a; rm '\\''b'\\'':7443'");
});
