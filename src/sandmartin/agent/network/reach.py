"""What a slot's guest may reach: the slot's policy, and the addresses of the names in it.

A rule knows addresses alone. So each address that a guest is told for a name is noted, and for a
name that its policy allows it is in the slot's rules before the guest has the answer. All answers
are noted, so that a policy that comes later finds what the guest knows already. How many are kept
is bounded, the oldest go first; and of an answer only the chain counts that begins at the name
that was asked for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address

import dns.exception
import dns.message
import dns.name
import dns.rdatatype

from sandmartin.agent.network import rules
from sandmartin.agent.network.slot import Slot
from sandmartin.errors import SandmartinError
from sandmartin.model import INTERNET, NetworkPolicy

_log = logging.getLogger(__name__)

#: Addresses of names that are kept for one guest.
MAX_TOLD = 1024
#: Programs connect some time after an answer, and the rules are not to change with each.
_SLACK_S = 60.0
_MAX_TTL_S = 86400.0
#: How long what a guest knew before counts at least under a policy that is new.
_KNOWN_S = 600.0


@dataclass(frozen=True)
class Patterns:
    """The names that a policy allows."""

    exact: frozenset[dns.name.Name] = frozenset()
    #: All names below these.
    parents: frozenset[dns.name.Name] = frozenset()

    @classmethod
    def of(cls, policy: NetworkPolicy) -> Patterns:
        names = policy.allowed_names
        return cls(
            frozenset(dns.name.from_text(each) for each in names if each[:2] != "*."),
            frozenset(dns.name.from_text(each[2:]) for each in names if each[:2] == "*."),
        )

    def __contains__(self, name: dns.name.Name) -> bool:
        # By labels: a dot inside of one is no dot between two.
        above = (dns.name.Name(name.labels[at:]) for at in range(1, len(name.labels)))
        return name in self.exact or any(each in self.parents for each in above)


@dataclass(frozen=True)
class _Told:
    """An address that a guest was told for a name."""

    name: dns.name.Name
    address: IPv4Address


@dataclass(frozen=True)
class _Answer:
    name: dns.name.Name
    addresses: Sequence[IPv4Address]
    ttl_s: float


class Reach:
    """What the guest of one slot may reach, by the slot's rules."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self._patterns = Patterns()
        #: When each stops to count (monotonic), those that were told last at the end.
        self._told: dict[_Told, float] = {}
        self._heard: list[_Answer] = []
        #: Orders all that is done to the rules.
        self._lock = asyncio.Lock()

    async def apply(self, policy: NetworkPolicy) -> None:
        """Reach what a policy allows, from now on. Raises ToolFailed, and all is as before."""
        async with self._lock:
            await self._apply(policy)

    async def keep(self, policy: NetworkPolicy) -> None:
        """The same for what an earlier agent left: its rules stay, if they are of this policy."""
        async with self._lock:
            if not await rules.are_of(self._slot, policy):
                await self._apply(policy)
                return
            self._patterns, now = Patterns.of(policy), time.monotonic()
            # What the guest was told since this agent listens.
            await self._load(self._named(lambda until: until - now), ())

    async def reset(self) -> None:
        """The default, for another guest: nothing is known of this one. Raises ToolFailed."""
        async with self._lock:
            self._told.clear()
            self._heard.clear()
            await self._apply(INTERNET)

    async def _apply(self, policy: NetworkPolicy) -> None:
        before, self._patterns = self._patterns, Patterns.of(policy)
        now = time.monotonic()
        named = self._named(lambda until: max(until - now, _KNOWN_S))
        try:
            await rules.load(rules.slot_rules(self._slot, policy, named), self._slot.netns_path)
        except BaseException:
            self._patterns = before
            raise

    def _named(self, rest_s: Callable[[float], float]) -> dict[IPv4Address, float]:
        """Addresses that were told for allowed names, and for how long they are to count."""
        return {
            told.address: rest_s(until)
            for told, until in self._told.items()
            if told.name in self._patterns
        }

    async def _load(self, new: Mapping[IPv4Address, float], gone: Collection[IPv4Address]) -> None:
        if new or gone:
            await rules.load(rules.named_elements(new, gone), self._slot.netns_path)

    # What the guest is told.

    async def learn(self, response: dns.message.Message) -> None:
        """Reach what the guest is about to be told, if its name is allowed."""
        if (answer := _read(response)) is None:
            return
        self._heard.append(answer)
        async with self._lock:
            # Whoever was first does it for all that wait.
            heard, self._heard = self._heard, []
            new: dict[IPv4Address, float] = {}
            gone: set[IPv4Address] = set()
            for each in heard:
                self._note(each, new, gone)
            try:
                await self._load(new, gone)
            except SandmartinError as error:
                # It is refused then, as if nobody had told of it, until it is told again.
                _log.warning("network slot %d: %s", self._slot.number, error)
                for told in [told for told in self._told if told.address in new]:
                    del self._told[told]

    def _note(self, answer: _Answer, new: dict[IPv4Address, float], gone: set[IPv4Address]) -> None:
        """Note an answer; what is `new` to the rules, and what is `gone` from them."""
        now = time.monotonic()
        allowed = answer.name in self._patterns
        for address in answer.addresses:
            told = _Told(answer.name, address)
            until = self._told.pop(told, 0.0)
            if until < now + answer.ttl_s:
                until = now + answer.ttl_s + _SLACK_S
                if allowed:
                    new[address] = until - now
                    gone.discard(address)
            self._told[told] = until
        while len(self._told) > MAX_TOLD:
            oldest = next(iter(self._told))
            del self._told[oldest]
            if oldest.name in self._patterns and not self._counts(oldest.address):
                new.pop(oldest.address, None)
                gone.add(oldest.address)

    def _counts(self, address: IPv4Address) -> bool:
        """Whether an address was told for any name that is allowed."""
        return any(each.address == address and each.name in self._patterns for each in self._told)


def _read(response: dns.message.Message) -> _Answer | None:
    """The addresses of the name that was asked for; None when it has none."""
    if not isinstance(response, dns.message.QueryMessage):
        return None
    try:
        chain = response.resolve_chaining()
    except dns.exception.DNSException:
        return None
    found = chain.answer
    if found is None or found.rdtype != dns.rdatatype.A:
        return None
    addresses = [IPv4Address(each.address) for each in found]
    ttl_s = min(float(chain.minimum_ttl), _MAX_TTL_S)
    return _Answer(response.question[0].name, addresses[:MAX_TOLD], ttl_s)
