/** The command that makes a machine a host. */

const LOOPBACK = new Set(["localhost", "127.0.0.1", "[::1]"]);

/** Where the control plane is, as the browser has it, is this machine's own name for itself. */
export const isLoopback = (control: URL): boolean => LOOPBACK.has(control.hostname);

/** What root runs there; `address` is where the control plane reaches it. */
export function agentCommand(control: URL, token: string, address: string): string {
  const listen = address.trim() || "ADDRESS";
  const words = [
    `SANDMARTIN_HOST_TOKEN=${token}`,
    "sandmartin agent",
    `--control ${control.origin}`,
    `--listen ${quoted(`${listen.includes(":") ? `[${listen}]` : listen}:7443`)}`,
  ];
  // Without it the token is sent over plain HTTP to the own machine alone.
  if (control.protocol === "http:" && !isLoopback(control)) words.push("--insecure-control");
  return words.join(" ");
}

function quoted(word: string): string {
  return /^[\w.:-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}
