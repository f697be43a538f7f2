"""Forwarding on the host's way out.

A packet is forwarded only if forwarding is on at the device where it arrives: at our links, and,
for the answers, at the device of the default route. Where a host forwards nothing, that device is
switched on, and rules keep it from forwarding for anybody but sandboxes. The last agent of the
machine that gives up its network switches it off again.
"""

from __future__ import annotations

from pathlib import Path

from pyroute2 import IPRoute

from sandmartin.agent.claims import Claims

_KIND = "forwarding:"


def claim_uplinks(claims: Claims) -> frozenset[str]:
    """The devices on which we need forwarding and which, before any agent, did not forward.

    Call it again when routes may have changed. Blocks shortly.
    """
    with claims.shared() as shared:
        for device in _default_devices():
            name = _KIND + device
            if name in shared or _setting(device).read_text().strip() == "0":
                shared.setdefault(name, set()).add(claims.instance_id)
        return frozenset(name.removeprefix(_KIND) for name in shared if name.startswith(_KIND))


def open_uplinks(devices: frozenset[str]) -> None:
    """Switch forwarding on, once there are rules for whom."""
    for device in devices:
        if (setting := _setting(device)).exists():
            setting.write_text("1")


def close_uplinks(claims: Claims) -> None:
    """Switch off what we switched on, unless another agent needs it."""
    with claims.shared() as shared:
        for name, users in list(shared.items()):
            users.discard(claims.instance_id)
            if name.startswith(_KIND) and not users:
                del shared[name]
                setting = _setting(name.removeprefix(_KIND))
                if setting.exists():
                    setting.write_text("0")


def _setting(device: str) -> Path:
    return Path("/proc/sys/net/ipv4/conf", device, "forwarding")


def _default_devices() -> set[str]:
    with IPRoute() as routes:
        indexes = [route.get("oif") for route in routes.get_default_routes(family=2)]
        links = routes.get_links(*[index for index in indexes if index]) if any(indexes) else ()
        return {str(link.get("ifname")) for link in links}
