"""Options of E2B's calls that are not served: whoever needs one is told, and never misled."""

from __future__ import annotations

from sandmartin.control.e2b import bodies
from sandmartin.errors import Unimplemented


def check_new(body: bodies.NewSandbox) -> None:
    """Raises Unimplemented."""
    if body.auto_pause:
        needs_memory(body.auto_pause_memory, "paused at its end")
    _refuse(bool(body.mcp), "MCP gateways")
    _refuse(bool(body.iam), "workload identities")
    _refuse(bool(body.volume_mounts), "volumes")
    if body.network is not None:
        check_network(body.network)
        _refuse(body.network.mask_request_host is not None, "masks of the request's host")
        _refuse(bool(body.network.https_ports), "ports that speak HTTPS inside")


def check_network(network: bodies.Egress) -> None:
    """Raises Unimplemented."""
    _refuse(network.dns_servers is not None, "DNS servers of one's own")
    _refuse(network.egress_proxy is not None, "proxies for what goes out")
    _refuse(bool(network.rules), "rules that change requests")


def check_pause(body: bodies.Pause) -> bool:
    """Whether only a guest that answers may be paused. Raises Unimplemented."""
    needs_memory(body.memory, "paused")
    return bool(body.require_healthy_guest)


def needs_memory(memory: bool | None, what: str) -> None:
    """Raises Unimplemented for a sandbox that is to lose its memory."""
    if memory is False:
        raise Unimplemented(
            f"a sandbox cannot be {what} without its memory", hint="leave `memory` out"
        )


def _refuse(is_wanted: bool, what: str) -> None:
    if is_wanted:
        raise Unimplemented(f"{what} are not served here", hint="see docs/e2b.md")
