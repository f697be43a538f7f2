"""Hosts: the machines that run agents, who may be one, and the way to each agent.

A host registers with a token that is shown once and works once, and gets a certificate for a key
that never leaves it. From then on it is known by that certificate and by a token of its own. What
it says of itself, its address above all, is whatever the holder of such a token says: to an
address nothing is sent before the other end has shown the certificate of just this host.
A host's state is changed here alone. `pending` became `online` by registering; one that is not
reached for long is `unreachable`, and its sandboxes are missing until it is reached again.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from sandmartin.control import audit, events, tables
from sandmartin.control.authority import Authority, name_of_host
from sandmartin.control.caller import ActorKind, Caller
from sandmartin.control.db import Database
from sandmartin.control.seal import digest
from sandmartin.control.states import ALIVE, HOLDING, HostState, TemplateState
from sandmartin.control.tables import PLATFORM_TEAM_ID
from sandmartin.errors import (
    AlreadyExists,
    Conflict,
    Invalid,
    NotFound,
    SandmartinError,
    Unauthenticated,
    Unavailable,
)
from sandmartin.model import State, check_name
from sandmartin.transport import HostInfo
from sandmartin.transport.agent import Agent, AgentSocket, RemoteAgent

#: How long a token for registering works.
TOKEN_S = 3600.0
#: Certificates that one host may show at a time: the newest, and those whose successor may never
#: have arrived.
_MAX_CERTIFICATES = 8
#: A host that goes on as before is written down at most so often.
_COALESCE_S = 10.0
_MAX_TOLD = 20
Row = tables.Host


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """A host as whoever runs its agent beside us knows it; the rest is asked of the agent."""

    name: str
    address: str
    cpus: int = 0
    memory_mb: int = 0
    disk_free_mb: int = 0
    cpu_overcommit: float = 1.0
    memory_overhead_mb: int = 0
    accel: str = ""
    version: str = ""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What sandboxes hold of a host."""

    running: int = 0
    paused: int = 0
    vcpus: int = 0
    memory_mb: int = 0


@dataclass(frozen=True, kw_only=True)
class Token:
    """What a machine needs to become a host; seen once."""

    text: str
    expires_at: float

    def __repr__(self) -> str:
        return f"Token(expires_at={self.expires_at})"


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What a host needs to be one."""

    host_id: str
    certificate: str
    expires_at: float
    #: The issuer of those that may connect to it.
    issuer: str
    #: For heartbeats and renewals; empty where the host keeps the one it has.
    token: str = ""

    def __repr__(self) -> str:
        return f"Credentials(host_id={self.host_id!r})"


@dataclass(frozen=True)
class _Way:
    address: str
    agent: Agent


class Hosts:
    """The hosts of this platform. To be closed."""

    def __init__(self, db: Database, authority: Authority) -> None:
        self._db = db
        self._authority = authority
        self._door = authority.door(self._accepts)
        self._ways: dict[str, _Way] = {}
        #: Serial numbers of the certificates that each host may show, by the name in them.
        self._accepted: dict[str, frozenset[int]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    # The way to a host.

    async def agent(self, host_id: str) -> Agent:
        """The way to a host's agent. Raises NotFound, Unavailable."""
        async with self._db.read() as session:
            host = await session.get(Row, host_id)
        if host is None or host.state == HostState.DELETED:
            self._forget(host_id)
            raise NotFound("the host of this sandbox is gone")
        if not host.address:
            raise Unavailable(f"host {host.name} has not registered yet")
        self._note_certificates(host)
        way = self._ways.get(host_id)
        if way is None or way.address != host.address:
            self._close_way(host_id)
            self._ways[host_id] = way = _Way(host.address, self._connect(host))
        return way.agent

    def _connect(self, host: Row) -> Agent:
        scheme, _, rest = host.address.partition(":")
        if scheme == "unix":
            return AgentSocket(Path(rest))
        if not host.certificate_serials:
            raise Unavailable(
                f"the certificates of host {host.name} were revoked",
                hint="register it again with a new token",
            )
        return RemoteAgent(host.address, self._door.context, name_of_host(host.host_id))

    def _note_certificates(self, host: Row) -> None:
        """Connections to one whose certificates were all taken away or replaced end at once."""
        name = name_of_host(host.host_id)
        now = frozenset(int(each, 16) for each in host.certificate_serials)
        before = self._accepted.get(name, now)
        self._accepted[name] = now
        if before and not before & now:
            self._close_way(host.host_id)
        # Also renews our own certificate when it is time.
        _ = self._door.context

    def _accepts(self, name: str, serial: int) -> bool:
        return serial in self._accepted.get(name, frozenset())

    def _forget(self, host_id: str) -> None:
        self._accepted.pop(name_of_host(host_id), None)
        self._close_way(host_id)

    def _close_way(self, host_id: str) -> None:
        if (way := self._ways.pop(host_id, None)) is not None:
            task = asyncio.create_task(_close(way.agent), name=f"close {host_id}")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        for host_id in list(self._ways):
            self._close_way(host_id)
        if self._closing:
            await asyncio.wait(set(self._closing))

    # What administrators do.

    async def list(self, caller: Caller) -> Sequence[tuple[Row, Load]]:
        """All hosts, with what sandboxes hold of them. Raises Denied."""
        caller.require_admin()
        query = select(Row).where(Row.state != HostState.DELETED).order_by(Row.name)
        async with self._db.read() as session:
            loads = await loads_of(session)
            return [(row, loads.get(row.host_id, Load())) for row in await session.scalars(query)]

    async def get(self, caller: Caller, host_id: str) -> tuple[Row, Load]:
        """Raises Denied, NotFound."""
        caller.require_admin()
        async with self._db.read() as session:
            row = await _find(session, host_id)
            return row, (await loads_of(session)).get(host_id, Load())

    async def create(self, caller: Caller, name: str) -> tuple[Row, Token]:
        """A host that is to come, and the token with which it may.

        Raises Denied, Invalid, AlreadyExists.
        """
        caller.require_admin()
        check_name(name, "host name")
        token = self._new_token()
        row = Row(
            host_id=str(uuid4()),
            name=name,
            state=HostState.PENDING,
            created_at=time.time(),
            registration_hash=digest(token.text),
            registration_expires_at=token.expires_at,
        )
        try:
            async with self._db.write() as session:
                session.add(row)
                await session.flush()
                _tell(session, caller, row, "host.created")
        except IntegrityError as error:
            raise AlreadyExists(f"there is a host {name!r} already") from error
        return row, token

    async def reissue(self, caller: Caller, host_id: str) -> Token:
        """A new token to register with, in the place of any other. Raises Denied, NotFound."""
        token = self._new_token()
        await self._change(
            caller,
            host_id,
            "host.token_reissued",
            registration_hash=digest(token.text),
            registration_expires_at=token.expires_at,
        )
        return token

    def _new_token(self) -> Token:
        # The dot and what follows tells the host whom to believe: see `Authority.fingerprint`.
        text = f"smr_{secrets.token_urlsafe(32)}.{self._authority.fingerprint}"
        return Token(text=text, expires_at=time.time() + TOKEN_S)

    async def drain(self, caller: Caller, host_id: str, *, undo: bool = False) -> Row:
        """It takes nothing new, until that is undone. Raises Denied, NotFound."""
        action = "host.undrained" if undo else "host.drained"
        return await self._change(caller, host_id, action, draining=not undo)

    async def revoke(self, caller: Caller, host_id: str) -> Row:
        """None of its certificates and tokens count any more. Raises Denied, NotFound, Invalid."""
        caller.require_admin()
        async with self._db.write() as session:
            row = await _hold(session, host_id)
            if row.address.startswith("unix:"):
                raise Invalid(f"host {row.name} has no certificate: it is this machine")
            row.certificate_serials, row.certificate_expires_at = [], None
            row.token_hash = row.registration_hash = row.registration_expires_at = None
            if row.state == HostState.ONLINE:
                row.state = HostState.UNREACHABLE
            _tell(session, caller, row, "host.revoked")
        self._note_certificates(row)
        return row

    async def _change(self, caller: Caller, host_id: str, action: str, **values: Any) -> Row:
        caller.require_admin()
        async with self._db.write() as session:
            row = await _hold(session, host_id)
            for name, value in values.items():
                setattr(row, name, value)
            _tell(session, caller, row, action)
        return row

    # Deleting.

    async def occupants(self, caller: Caller, host_id: str) -> tuple[Sequence[str], Sequence[str]]:
        """What would be lost with a host: sandboxes, and templates that are nowhere else.

        Raises Denied, NotFound.
        """
        caller.require_admin()
        async with self._db.read() as session:
            await _find(session, host_id)
            return await _sandboxes_on(session, host_id), await _templates_only_on(session, host_id)

    async def delete(self, caller: Caller, host_id: str, *, force: bool = False) -> None:
        """End a host's agent, and with `force` all its sandboxes, and forget it.

        Raises Denied, NotFound; Conflict when something would be lost, and Unavailable when it
        cannot be reached: `force` ends both.
        """
        caller.require_admin()
        was_draining = await self._begin_delete(host_id, force=force)
        try:
            await self._terminate(host_id)
        except SandmartinError as error:
            if not force:
                async with self._db.write() as session:
                    row = await _hold(session, host_id)
                    row.draining = was_draining
                raise Unavailable(
                    f"the host's agent cannot be told to end: {error.message}",
                    hint="delete it with force; what runs on it is then yours to end",
                ) from error
        async with self._db.write() as session:
            await _end_host(session, caller, await _hold(session, host_id))
        self._forget(host_id)

    async def _begin_delete(self, host_id: str, *, force: bool) -> bool:
        """Nothing new comes to it from now on; whether that was so before."""
        async with self._db.write() as session:
            row = await _hold(session, host_id)
            if row.address.startswith("unix:"):
                raise Conflict(
                    f"host {row.name} is the machine of this control plane",
                    hint="it ends with `sandmartin up`",
                )
            was_draining, row.draining = row.draining, True
            # First, so that a create that chooses it just now is among what is counted.
            await session.flush()
            lost = [*await _sandboxes_on(session, host_id)]
            lost += [f"template {each}" for each in await _templates_only_on(session, host_id)]
            if lost and not force:
                more = f" and {len(lost) - _MAX_TOLD} more" if len(lost) > _MAX_TOLD else ""
                raise Conflict(
                    f"host {row.name} still has {', '.join(lost[:_MAX_TOLD])}{more}",
                    hint="destroy them, or delete the host with force",
                )
        return was_draining

    async def _terminate(self, host_id: str) -> None:
        async with self._db.read() as session:
            row = await _find(session, host_id)
        if row.address:
            await (await self.agent(host_id)).terminate()

    # What hosts do.

    async def register(
        self, token: str, request: str, address: str, info: HostInfo, caller_address: str = ""
    ) -> Credentials:
        """Make the machine that has a token the host it was made for.

        Raises Unauthenticated, Invalid.
        """
        check_address(address)
        async with self._db.write() as session:
            query = select(Row).where(
                Row.registration_hash == digest(token),
                Row.registration_expires_at > time.time(),
                Row.state != HostState.DELETED,
            )
            # Where transactions write side by side, the second of two finds it used.
            row = await session.scalar(query.with_for_update())
            if row is None:
                raise Unauthenticated(
                    "the token is not known, was used, or is too old",
                    hint="an administrator gets a new one with `sandmartin host token NAME`",
                )
            issued = self._authority.certify_host(row.host_id, request)
            own = f"smh_{secrets.token_urlsafe(32)}"
            row.registration_hash = row.registration_expires_at = None
            row.token_hash = digest(own)
            row.certificate_serials = [f"{issued.serial:x}"]
            row.certificate_expires_at = issued.expires_at
            row.address, row.state = address, HostState.ONLINE
            row.heartbeat_at = row.reached_at = time.time()
            _note_facts(row, info)
            _tell(session, _host_as_caller(row, caller_address), row, "host.registered")
        return Credentials(
            host_id=row.host_id,
            certificate=issued.certificate,
            expires_at=issued.expires_at,
            issuer=self._authority.control_issuer,
            token=own,
        )

    async def heartbeat(self, host_id: str, token: str, address: str, info: HostInfo) -> None:
        """A host is there, and this is what it has.

        Raises Unauthenticated, NotFound when it was deleted, Invalid.
        """
        check_address(address)
        async with self._db.write() as session:
            row = await _authenticate(session, host_id, token)
            row.heartbeat_at = time.time()
            _note_facts(row, info)
            if row.address != address:
                row.address = address
                _tell(session, _host_as_caller(row), row, "host.moved", address=address)

    async def renew(self, host_id: str, token: str, request: str) -> Credentials:
        """A new certificate; those before it count until they expire.

        Raises Unauthenticated, NotFound when it was deleted, Invalid.
        """
        async with self._db.write() as session:
            row = await _authenticate(session, host_id, token)
            issued = self._authority.certify_host(host_id, request)
            serials = [f"{issued.serial:x}", *row.certificate_serials]
            row.certificate_serials = serials[:_MAX_CERTIFICATES]
            row.certificate_expires_at = issued.expires_at
            _tell(session, _host_as_caller(row), row, "host.renewed")
        return Credentials(
            host_id=host_id,
            certificate=issued.certificate,
            expires_at=issued.expires_at,
            issuer=self._authority.control_issuer,
        )

    async def ensure_local(self, facts: HostFacts) -> str:
        """The host on this machine, whose agent runs beside us; its id."""
        async with self._db.write() as session:
            query = select(Row).where(Row.name == facts.name, Row.state != HostState.DELETED)
            host = await session.scalar(query.with_for_update())
            if host is None:
                host = Row(host_id=str(uuid4()), name=facts.name, created_at=time.time())
                session.add(host)
            for name, value in vars(facts).items():
                setattr(host, name, value)
            host.state, host.reached_at = HostState.ONLINE, time.time()
            return host.host_id

    # What the reconciler sees.

    async def list_reachable(self) -> Sequence[Row]:
        """All hosts that have an address and are not deleted."""
        query = select(Row).where(
            Row.state.in_([HostState.ONLINE, HostState.UNREACHABLE]), Row.address != ""
        )
        async with self._db.read() as session:
            return (await session.scalars(query.order_by(Row.name))).all()

    async def mark_online(self, host_id: str, info: HostInfo) -> bool:
        """It was reached just now, and has this; whether it was not online before."""
        now = time.time()
        async with self._db.read() as session:
            host = await session.get(Row, host_id)
        if host is None or (
            host.state == HostState.ONLINE
            and now - (host.reached_at or 0) < _COALESCE_S
            and not _differs(host, info)
        ):
            return False
        async with self._db.write() as session:
            host = await session.get(Row, host_id, with_for_update=True)
            if host is None or host.state not in {HostState.ONLINE, HostState.UNREACHABLE}:
                return False
            came = host.state != HostState.ONLINE
            host.state, host.reached_at = HostState.ONLINE, now
            _note_facts(host, info)
            if came:
                events.record(session, PLATFORM_TEAM_ID, "host.up", host=host.name)
            return came


async def mark_unreachable(session: AsyncSession, host: Row) -> bool:
    """It was not reached for too long; whether it was online before. In a transaction."""
    done = await session.execute(
        update(Row)
        .where(
            Row.host_id == host.host_id,
            Row.state == HostState.ONLINE,
            Row.reached_at == host.reached_at,
        )
        .values(state=HostState.UNREACHABLE)
    )
    if not done.rowcount:  # type: ignore[attr-defined]
        return False
    events.record(session, PLATFORM_TEAM_ID, "host.down", host=host.name)
    return True


async def loads_of(session: AsyncSession) -> Mapping[str, Load]:
    """What sandboxes hold of each host that has some."""
    row = tables.Sandbox
    holds = row.state.in_(HOLDING)
    query = (
        select(
            row.host_id,
            func.count().filter(holds),
            func.count().filter(row.state == State.PAUSED),
            func.coalesce(func.sum(row.vcpus).filter(holds), 0),
            func.coalesce(func.sum(row.memory_mb).filter(holds), 0),
        )
        .where(row.state.in_(ALIVE), row.host_id.is_not(None))
        .group_by(row.host_id)
    )
    found = await session.execute(query)
    return {
        host_id: Load(running=running, paused=paused, vcpus=int(vcpus), memory_mb=int(memory_mb))
        for host_id, running, paused, vcpus, memory_mb in found
        if host_id is not None
    }


def check_address(address: str) -> str:
    """Return a host's address if it may be one. Raises Invalid.

    Private ones and loopback are usual. That nobody else is asked anything there is not this
    check's doing but the certificate's.
    """
    try:
        parts = urlsplit(address)
        port, name = parts.port, parts.hostname or ""
    except ValueError as error:
        raise Invalid("the host's address is none", hint="use https://NAME:PORT") from error
    plain = address == f"https://{parts.netloc}" and "@" not in parts.netloc
    if not plain or not name or not port or len(address) > 300:
        raise Invalid(f"the host's address is {address[:80]!r}", hint="use https://NAME:PORT")
    with contextlib.suppress(ValueError):
        ip = ip_address(name)
        if ip.is_link_local or ip.is_multicast or ip.is_unspecified:
            raise Invalid(f"the host cannot have the address {name}")
    return address


async def _hold(session: AsyncSession, host_id: str) -> Row:
    """The host, which nobody else changes until the transaction ends. Raises NotFound."""
    return await _find(session, host_id, lock=True)


async def _find(session: AsyncSession, host_id: str, *, lock: bool = False) -> Row:
    row = await session.get(Row, host_id, with_for_update=lock)
    if row is None or row.state == HostState.DELETED:
        raise NotFound(f"there is no host {host_id[:80]!r}")
    return row


async def _authenticate(session: AsyncSession, host_id: str, token: str) -> Row:
    """The host that has this token of its own. Raises Unauthenticated, NotFound."""
    query = select(Row).where(Row.token_hash == digest(token))
    row = await session.scalar(query.with_for_update())
    if row is None or row.host_id != host_id:
        raise Unauthenticated(
            "the host's token is not known", hint="register it again with a new token"
        )
    if row.state == HostState.DELETED:
        raise NotFound("this host was deleted")
    return row


async def _sandboxes_on(session: AsyncSession, host_id: str) -> Sequence[str]:
    row = tables.Sandbox
    query = select(row.sandbox_id).where(row.host_id == host_id, row.state.in_(ALIVE))
    return (await session.scalars(query.order_by(row.created_at))).all()


async def _templates_only_on(session: AsyncSession, host_id: str) -> Sequence[str]:
    """Templates of teams that no other host has, nor the artefact store."""
    placed, template = tables.TemplatePlacement, tables.Template
    elsewhere = select(placed.template_id).where(placed.host_id != host_id)
    stored = select(tables.Artefact.template_id).where(tables.Artefact.artefact_id.is_not(None))
    query = (
        select(template.name)
        .join(placed, placed.template_id == template.template_id)
        .where(
            placed.host_id == host_id,
            template.team_id != PLATFORM_TEAM_ID,
            template.state.not_in({TemplateState.RETIRED, TemplateState.HIDDEN}),
            template.template_id.not_in(elsewhere),
            template.template_id.not_in(stored),
        )
    )
    return (await session.scalars(query.order_by(template.name))).all()


async def _end_host(session: AsyncSession, caller: Caller, row: Row) -> None:
    """The host is gone, and what was on it with it."""
    now = time.time()
    sandbox, operation = tables.Sandbox, tables.Operation
    reason = f"its host {row.name} was deleted"
    ended = await session.execute(
        update(sandbox)
        .where(sandbox.host_id == row.host_id, sandbox.state.in_(ALIVE))
        .values(
            state=State.STOPPED,
            state_at=now,
            ended_at=now,
            reason=reason,
            operation_id=None,
            host_ip="",
        )
        .returning(sandbox.sandbox_id, sandbox.team_id)
        .execution_options(synchronize_session=False)
    )
    teams = {sandbox_id: team_id for sandbox_id, team_id in ended}
    told = {"state": State.STOPPED, "reason": reason}
    for sandbox_id, team_id in teams.items():
        events.record(session, team_id, "sandbox.stopped", sandbox_id, **told)
    await session.execute(
        update(operation)
        .where(operation.sandbox_id.in_(teams), operation.finished_at.is_(None))
        # Whoever works on one finds that it was overtaken.
        .values(finished_at=now, error_code="overtaken", arguments={})
    )
    placed = tables.TemplatePlacement
    await session.execute(delete(placed).where(placed.host_id == row.host_id))
    row.state, row.address, row.certificate_serials = HostState.DELETED, "", []
    row.registration_hash = row.certificate_expires_at = None
    _tell(session, caller, row, "host.deleted", sandboxes=sorted(teams))


def _note_facts(row: Row, info: HostInfo) -> None:
    for name, value in _facts(info).items():
        setattr(row, name, value)


def _facts(info: HostInfo) -> Mapping[str, Any]:
    return {
        "cpus": info.cpus,
        "memory_mb": info.memory_mb,
        "memory_overhead_mb": info.memory_overhead_mb,
        "disk_free_mb": info.disk_free_mb,
        "cpu_overcommit": info.cpu_overcommit,
        "accel": info.accel,
        "vmm_version": info.vmm_version,
        "version": info.agent_version,
    }


def _differs(row: Row, info: HostInfo) -> bool:
    """Whether a host has another shape than the row; its free disk changes all the time."""
    facts = {name: value for name, value in _facts(info).items() if name != "disk_free_mb"}
    return any(getattr(row, name) != value for name, value in facts.items())


def _tell(session: AsyncSession, caller: Caller, row: Row, action: str, **data: Any) -> None:
    audit.record(
        session,
        caller,
        action,
        "host",
        row.host_id,
        scope="admin",
        team_id=PLATFORM_TEAM_ID,
        name=row.name,
        **data,
    )
    events.record(session, PLATFORM_TEAM_ID, action, host=row.name)


def _host_as_caller(row: Row, address: str = "") -> Caller:
    return Caller(
        kind=ActorKind.HOST,
        actor_id=row.host_id,
        name=row.name,
        team_id=PLATFORM_TEAM_ID,
        address=address,
    )


async def _close(agent: Agent) -> None:
    with contextlib.suppress(SandmartinError, OSError):
        await agent.aclose()
