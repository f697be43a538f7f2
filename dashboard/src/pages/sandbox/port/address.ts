/** Where a port of a sandbox is reached from this browser. */

export const MOST = 65_535;

/**
 * The address of a port; empty where no name leads there. `page` is where the dashboard is: every
 * browser takes names below `localhost` for its own machine.
 */
export function addressOf(
  port: number,
  sandboxId: string,
  domain: string,
  page: { protocol: string; hostname: string; port: string },
): string {
  const label = `${port}-${sandboxId}`;
  if (domain) return `${page.protocol}//${label}.${domain}/`;
  if (!isLoopback(page.hostname)) return "";
  return `${page.protocol}//${label}.localhost${page.port ? `:${page.port}` : ""}/`;
}

function isLoopback(name: string): boolean {
  return (
    name === "localhost" ||
    name.endsWith(".localhost") ||
    name === "[::1]" ||
    /^127(\.\d{1,3}){3}$/.test(name)
  );
}
