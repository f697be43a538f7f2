"""Packet rules, as nftables tables: one on the host for each agent, one in every slot.

The slot's table says what its sandbox may reach. The host's table says what no sandbox may ever
do, whatever its own policy: reach the host itself, another sandbox, or send in a foreign name.
Tables are replaced whole in one transaction, so there is no moment without rules.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from ipaddress import IPv4Network
from pathlib import Path

from sandmartin.agent import proc
from sandmartin.agent.network.slot import LINK_PREFIX, TAP, UPLINK, Slot, link_prefix
from sandmartin.errors import ToolFailed

#: What is not the Internet: private, shared, link-local (metadata services are there), loopback,
#: protocol assignments, benchmarking, multicast and reserved ranges (RFC 6890).
NOT_INTERNET = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
_SLOT_TABLE = "sandmartin"
_DEADLINE_S = 15.0
_FLOW_TRIES = 10


def host_table(instance_id: str) -> str:
    """Name of an agent's table on the host."""
    return f"sandmartin-{instance_id}"


def _replacing(table: str, body: str) -> str:
    return f"table inet {table} {{}}\ndelete table inet {table}\ntable inet {table} {{\n{body}}}\n"


def host_rules(instance_id: str, addresses: IPv4Network, guarded: Iterable[str]) -> str:
    """The host's table. `guarded` are the links on which forwarding was off before us."""
    ours, any_slot = f'"{link_prefix(instance_id)}*"', f'"{LINK_PREFIX}*"'
    # They forward what comes for sandboxes, and for nobody else, as before.
    guards = "".join(
        f'    iifname "{link}" oifname != {any_slot} drop\n' for link in sorted(guarded)
    )
    return _replacing(
        host_table(instance_id),
        f"""
  chain prerouting {{
    type filter hook prerouting priority mangle; policy accept;
    iifname != {ours} accept
    meta nfproto ipv6 drop
    ct state invalid drop
    fib saddr . iif oif missing drop
    ct state established,related accept
    fib daddr type != unicast reject with icmpx admin-prohibited
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
{guards}    oifname {ours} meta nfproto ipv6 drop
    iifname {ours} oifname {any_slot} reject with icmpx admin-prohibited
    oifname {ours} ct state new,invalid,untracked drop
    iifname {ours} tcp flags syn tcp option maxseg size set rt mtu
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {addresses} oifname != {any_slot} masquerade
  }}
""",
    )


def slot_rules(slot: Slot) -> str:
    """A slot's table with the default policy: the Internet, and nothing that is not."""
    denied = ", ".join(str(network) for network in NOT_INTERNET)
    return _replacing(
        _SLOT_TABLE,
        f"""
  set denied {{
    type ipv4_addr; flags interval;
    elements = {{ {denied} }}
  }}
  chain prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname "{UPLINK}" ip daddr {slot.host_ip} dnat ip to {slot.guest_ip}
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname "{TAP}" snat ip to {slot.gateway_ip}
    oifname "{UPLINK}" snat ip to {slot.host_ip}
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    meta nfproto ipv6 drop
    ct state established,related accept
    iifname "{TAP}" ip saddr {slot.guest_ip} ip daddr {slot.gateway_ip} jump gateway
  }}
  chain gateway {{
    meta l4proto {{ tcp, udp }} th dport 53 limit rate 200/second burst 400 packets accept
    icmp type echo-request limit rate 20/second accept
    limit rate 20/second reject with icmpx port-unreachable
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    meta nfproto ipv6 drop
    ct state invalid drop
    ct state established,related accept
    iifname "{UPLINK}" oifname "{TAP}" ct status dnat accept
    iifname "{TAP}" ip saddr != {slot.guest_ip} drop
    iifname "{TAP}" ip daddr @denied reject with icmpx admin-prohibited
    iifname "{TAP}" oifname "{UPLINK}" accept
  }}
  chain output {{
    type filter hook output priority filter; policy accept;
    meta nfproto ipv6 drop
  }}
""",
    )


async def load(rules: str, netns: Path | None = None) -> None:
    """Load rules, in the namespace `netns` if given. Raises ToolFailed."""
    await proc.run(
        [*_entering(netns), "nft", "-f", "-"], stdin=rules.encode(), deadline_s=_DEADLINE_S
    )


async def remove_host_table(instance_id: str) -> None:
    """Remove an agent's table on the host. Idempotent."""
    table = host_table(instance_id)
    await load(f"table inet {table} {{}}\ndelete table inet {table}\n")


async def forget_flows(slot: Slot) -> None:
    """Forget every connection that a slot has or had, so that the next sandbox inherits none."""
    inside = [*_entering(slot.netns_path), "conntrack"]
    await proc.run([*inside, "-F"], deadline_s=_DEADLINE_S)
    for side in ("--orig-src", "--orig-dst", "--reply-src"):
        await _delete_flows([side, str(slot.host_ip)])


async def _delete_flows(which: list[str]) -> None:
    said = b""
    # The listing it works from fails when others change the table meanwhile.
    for _ in range(_FLOW_TRIES):
        done = await proc.run(["conntrack", "-D", *which], deadline_s=_DEADLINE_S, check=False)
        said = done.stderr
        # It exits 1 when there was none.
        if b"have been deleted" in said:
            return
    raise ToolFailed(f"connections cannot be forgotten: {said.decode(errors='replace').strip()}")


def _entering(netns: Path | None) -> list[str]:
    return [] if netns is None else ["nsenter", f"--net={os.fspath(netns)}", "--"]
