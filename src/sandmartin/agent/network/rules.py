"""Packet rules, as nftables tables: one on the host for each agent, one in every slot.

The slot's table says what its sandbox may reach, by its policy. The host's table says what no
sandbox may ever do, whatever its policy: reach the host itself, another sandbox, or send in a
foreign name.
Tables are replaced whole in one transaction, so there is no moment without rules.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network, collapse_addresses
from pathlib import Path

from sandmartin.agent import proc
from sandmartin.agent.network.slot import LINK_PREFIX, TAP, UPLINK, Slot, link_prefix
from sandmartin.errors import ToolFailed
from sandmartin.model import INTERNET, NetworkPolicy

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
_NAMED = "named"
#: Those that are kept, and those that an earlier agent kept.
_MAX_NAMED = 4096
_LEAST_S = 1
#: Raised when a slot's rules change, so that an agent does not keep those of an earlier release.
_RULES = 1
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


def _slot_sets(policy: NetworkPolicy, named: Mapping[IPv4Address, float]) -> str:
    """The addresses that the rules of a slot ask for."""
    return f"""\
  set never {{
    type ipv4_addr; flags interval;
{_elements(NOT_INTERNET)}  }}
  set allowed {{
    type ipv4_addr; flags interval;
{_elements(collapse_addresses(policy.allowed_networks))}  }}
  set denied {{
    type ipv4_addr; flags interval;
{_elements(collapse_addresses(policy.denied_networks))}  }}
  set {_NAMED} {{
    type ipv4_addr; flags timeout; size {_MAX_NAMED};
{_elements(map(_timed, named.items()))}  }}
"""


def _gateway_chains(slot: Slot) -> str:
    """What the guest may ask of its gateway."""
    return f"""\
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
"""


def slot_rules(
    slot: Slot,
    policy: NetworkPolicy = INTERNET,
    named: Mapping[IPv4Address, float] | None = None,
) -> str:
    """A slot's table with its policy; `named` are addresses of allowed names, and for how long.

    A flow that was let pass carries the policy's mark and goes on without being asked again. One
    with another mark, or none, was begun under another policy, and is judged anew by where it
    went to first: so a change is one for open flows too, at the moment of the transaction.
    """
    # What comes from elsewhere belongs to a flow that the guest has begun, or to nobody.
    host, mark = slot.link_host_ip, _mark(policy)
    return _replacing(
        _SLOT_TABLE,
        f"""
{_slot_sets(policy, named or {})}  chain prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname "{UPLINK}" ip saddr {host} ip daddr {slot.host_ip} dnat ip to {slot.guest_ip}
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname "{TAP}" snat ip to {slot.gateway_ip}
    oifname "{UPLINK}" snat ip to {slot.host_ip}
  }}
{_gateway_chains(slot)}  chain forward {{
    type filter hook forward priority filter; policy drop;
    meta nfproto ipv6 drop
    ct state invalid drop
    ct status dnat accept
    ct state established,related ct mark {mark:#x} accept
    iifname "{UPLINK}" ct state new drop
    iifname "{TAP}" ip saddr != {slot.guest_ip} drop
    ct original ip daddr @never goto refuse
    ct original ip daddr @allowed goto permit
    ct original ip daddr @{_NAMED} goto permit
    ct original ip daddr @denied goto refuse
    goto permit
  }}
  chain permit {{
    ct mark set {mark:#x}
    iifname "{TAP}" oifname "{UPLINK}" accept
    iifname "{UPLINK}" oifname "{TAP}" accept
  }}
  chain refuse {{
    meta l4proto tcp ct state established reject with tcp reset
    reject with icmpx admin-prohibited
  }}
  chain output {{
    type filter hook output priority filter; policy accept;
    meta nfproto ipv6 drop
  }}
  chain {_tag(policy)} {{ }}
""",
    )


def named_elements(new: Mapping[IPv4Address, float], gone: Collection[IPv4Address]) -> str:
    """A slot's addresses of allowed names: those that are new, or count for longer, and gone."""
    lines = []
    # What is there keeps its time when it is added, and what is not there cannot be deleted.
    for address, seconds in [*new.items(), *((each, _LEAST_S) for each in gone)]:
        element = f"element inet {_SLOT_TABLE} {_NAMED} {{ {_timed((address, seconds))} }}\n"
        bare = f"element inet {_SLOT_TABLE} {_NAMED} {{ {address} }}\n"
        lines += [f"add {element}", f"delete {bare}"]
        if address in new:
            lines.append(f"add {element}")
    return "".join(lines)


async def are_of(slot: Slot, policy: NetworkPolicy) -> bool:
    """Whether the slot's table is that of a policy."""
    words = [*_entering(slot.netns_path), "nft", "list", "chain", "inet", _SLOT_TABLE, _tag(policy)]
    return (await proc.run(words, deadline_s=_DEADLINE_S, check=False)).returncode == 0


def _digest(policy: NetworkPolicy) -> bytes:
    return hashlib.sha256(json.dumps(policy.to_dict()).encode()).digest()


def _tag(policy: NetworkPolicy) -> str:
    """Name of an empty chain, by which a table says whose it is."""
    return f"policy-{_RULES}-{_digest(policy).hex()[:16]}"


def _mark(policy: NetworkPolicy) -> int:
    """Of the flows that were let pass under a policy; never 0, which is no mark."""
    return int.from_bytes(_digest(policy)[:4]) | 1


def _elements(elements: Iterable[object]) -> str:
    listed = ", ".join(map(str, elements))
    return f"    elements = {{ {listed} }}\n" if listed else ""


def _timed(element: tuple[IPv4Address, float]) -> str:
    return f"{element[0]} timeout {max(_LEAST_S, int(element[1]))}s"


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
