"""Names of the ports of sandboxes: what their URLs are."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit

from sandmartin.errors import Invalid


def name_of(server: str, domain: str, sandbox_id: str, port: int) -> str:
    """The URL of a port of a sandbox: below `domain`, or else below the server's own name.

    Raises Invalid where there is no such name.
    """
    parsed = urlsplit(server)
    own = f":{parsed.port}" if parsed.port else ""
    if not domain:
        domain = _name_below(parsed.hostname or "") + own
    elif ":" not in domain:
        domain += own
    return f"{parsed.scheme}://{port}-{sandbox_id}.{domain}"


def _name_below(host: str) -> str:
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if address.is_loopback:
        # An address has no names below it; this one has.
        return "localhost"
    raise Invalid(
        f"the control plane is at {host}, an address, which can have no names below it",
        hint="reach it by its name, or have its operator set a domain",
    )
