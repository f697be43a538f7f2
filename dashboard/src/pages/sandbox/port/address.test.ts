import { expect, test } from "vitest";
import { addressOf } from "./address";

const page = (hostname: string, port = "8080", protocol = "http:") => ({
  hostname,
  port,
  protocol,
});

test("with a domain ports have names there", () => {
  const secure = page("sandmartin.example.com", "", "https:");
  expect(addressOf(80, "sb1", "example.net", secure)).toBe("https://80-sb1.example.net/");
  expect(addressOf(80, "sb1", "b.localhost:8443", secure)).toBe("https://80-sb1.b.localhost:8443/");
});

test("without one this very machine has names", () => {
  for (const name of ["localhost", "127.0.0.1", "127.8.0.1", "[::1]", "bank.localhost"]) {
    expect(addressOf(3000, "sb1", "", page(name))).toBe("http://3000-sb1.localhost:8080/");
  }
  expect(addressOf(3000, "sb1", "", page("localhost", ""))).toBe("http://3000-sb1.localhost/");
});

test("elsewhere there are none", () => {
  for (const name of ["10.0.0.5", "example.com", "127.0.0.1.example.com", "localhost.example"]) {
    expect(addressOf(3000, "sb1", "", page(name))).toBe("");
  }
});
