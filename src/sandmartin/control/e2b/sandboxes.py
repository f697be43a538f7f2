"""`/sandboxes` and `/v2/sandboxes`: their life."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Literal
from urllib.parse import parse_qsl, unquote

from fastapi import APIRouter, Header, Query, Response

from sandmartin.control import tables
from sandmartin.control.api.access import TheCaller, ThePlatform
from sandmartin.control.caller import Caller
from sandmartin.control.e2b import bodies
from sandmartin.control.e2b.names import plain_name
from sandmartin.control.e2b.network import wanted_policy
from sandmartin.control.e2b.options import check_new, check_pause, needs_memory
from sandmartin.control.e2b.steps import get_there, step
from sandmartin.control.platform import Platform
from sandmartin.control.requests import Filter, NewChildren, NewRow
from sandmartin.errors import Conflict, GuestSilent, Invalid, NotFound, Unavailable
from sandmartin.model import State

router = APIRouter()

_MAX_KEY = 255
_MAX_PAGE = 100
#: Of an old list, which has no pages.
_READ_AHEAD = 1000

IdempotencyKey = Annotated[str, Header(max_length=_MAX_KEY, pattern="^[A-Za-z0-9-]*$")]


# Creating.


@router.post("/v2/sandboxes", status_code=201, response_model_exclude_none=True)
async def create(
    body: bodies.NewSandbox,
    caller: TheCaller,
    platform: ThePlatform,
    idempotency_key: IdempotencyKey = "",
) -> bodies.Sandbox:
    """Start a sandbox. The same Idempotency-Key and body give the same sandbox."""
    return await _create(body, caller, platform, idempotency_key)


@router.post("/sandboxes", status_code=201, response_model_exclude_none=True)
async def create_old(
    body: bodies.OldNewSandbox,
    caller: TheCaller,
    platform: ThePlatform,
    idempotency_key: IdempotencyKey = "",
) -> bodies.Sandbox:
    """Start a sandbox, for a shorter time unless it is told."""
    return await _create(body, caller, platform, idempotency_key)


async def _create(
    body: bodies.NewSandbox, caller: Caller, platform: Platform, idempotency_key: str
) -> bodies.Sandbox:
    check_new(body)
    if body.timeout <= 0:
        raise Invalid(f"timeout is {body.timeout}", hint="use at least 1 s")
    private = body.network is not None and body.network.allow_public_traffic is False
    new = NewRow(
        template=await plain_name(platform, caller, body.template_id),
        lifetime_s=_lifetime(platform, body.timeout),
        on_timeout="pause" if body.auto_pause else "kill",
        auto_resume=body.auto_resume is not None and body.auto_resume.enabled,
        public_traffic=not private,
        network=wanted_policy(body),
        labels=body.metadata or {},
        envs=body.env_vars or {},
    )
    row = await platform.sandboxes.create(caller, new, idempotency_key)
    return bodies.Sandbox.of(row, platform)


def _lifetime(platform: Platform, timeout_s: int) -> int:
    """Raises Invalid for a time that is too long."""
    most = platform.settings.max_lifetime_s
    if timeout_s > most:
        raise Invalid(f"timeout is {timeout_s}", hint=f"use at most {most} s")
    return timeout_s


# Looking.


@router.get("/v2/sandboxes", response_model_exclude_none=True)
async def list_sandboxes(
    response: Response,
    caller: TheCaller,
    platform: ThePlatform,
    metadata: Annotated[str, Query(description="`k=v&k=v`, URL-encoded.")] = "",
    state: Annotated[list[str] | None, Query(description="`running`, `paused`, or both.")] = None,
    order: Literal["asc", "desc"] = "desc",
    started_after: Annotated[datetime | None, Query(alias="startedAfter")] = None,
    template: Annotated[str, Query(max_length=300)] = "",
    limit: Annotated[int, Query(ge=1, le=_MAX_PAGE)] = _MAX_PAGE,
    next_token: Annotated[str, Query(alias="nextToken", max_length=200)] = "",
) -> list[bodies.ListedSandbox]:
    """The team's sandboxes, newest first; `x-next-token` leads to the next page."""
    words = _words(state)
    states = frozenset[State]().union(*(_STATES[each] for each in words))
    wanted = Filter(
        states=states,
        labels=_labels(metadata),
        template=await plain_name(platform, caller, template) if template else "",
        started_after=None if started_after is None else _timestamp(started_after),
        oldest_first=order == "asc",
        limit=limit,
        cursor=next_token,
    )
    page = await platform.sandboxes.list(caller, wanted)
    if page.next:
        response.headers["x-next-token"] = page.next
    if "running" in words:
        running = await platform.sandboxes.count(caller, bodies.LISTED_RUNNING)
        response.headers["x-total-running"] = str(running)
    return [bodies.ListedSandbox.of(row) for row in page.rows]


_STATES = {"running": bodies.LISTED_RUNNING, "paused": bodies.PAUSED}


def _words(state: list[str] | None) -> set[str]:
    words = {word for each in state or _STATES for word in each.split(",")}
    if unknown := words - set(_STATES):
        raise Invalid(f"state is {sorted(unknown)[0][:80]!r}", hint="use `running` or `paused`")
    return words


def _labels(metadata: str) -> dict[str, str]:
    """Names and values are encoded by themselves, and once more as a query."""
    try:
        pairs = parse_qsl(metadata, keep_blank_values=True, strict_parsing=bool(metadata))
    except ValueError as error:
        raise Invalid("metadata is no query", hint="use k=v&k=v") from error
    return {unquote(name): unquote(value) for name, value in pairs}


def _timestamp(at: datetime) -> float:
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


@router.get("/sandboxes", response_model_exclude_none=True)
async def list_old(
    caller: TheCaller, platform: ThePlatform, metadata: str = ""
) -> list[bodies.ListedSandbox]:
    """All that run, newest first."""
    labels = _labels(metadata)
    return [bodies.ListedSandbox.of(row) async for row in _running(platform, caller, labels)]


async def _running(
    platform: Platform, caller: Caller, labels: dict[str, str]
) -> AsyncIterator[tables.Sandbox]:
    cursor = ""
    while True:
        wanted = Filter(
            states=bodies.LISTED_RUNNING, labels=labels, limit=_READ_AHEAD, cursor=cursor
        )
        page = await platform.sandboxes.list(caller, wanted)
        for row in page.rows:
            yield row
        if not (cursor := page.next):
            return


@router.get("/sandboxes/{sandbox_id}", response_model_exclude_none=True)
async def get(sandbox_id: str, caller: TheCaller, platform: ThePlatform) -> bodies.SandboxDetail:
    row = await get_there(platform, caller, sandbox_id)
    return bodies.SandboxDetail.of_row(row, platform)


# Time.


@router.post("/sandboxes/{sandbox_id}/timeout", status_code=204)
async def set_timeout(
    sandbox_id: str, body: bodies.Timeout, caller: TheCaller, platform: ThePlatform
) -> Response:
    """Let it end after so long from now, be that later or sooner."""
    lifetime_s = _lifetime(platform, body.timeout)

    async def act(row: tables.Sandbox) -> None:
        _require_awake(row)
        await platform.deadlines.set(caller, row.sandbox_id, lifetime_s)

    await step(platform, caller, sandbox_id, act)
    return Response(status_code=204)


@router.post("/sandboxes/{sandbox_id}/refreshes", status_code=204)
async def refresh(
    sandbox_id: str,
    caller: TheCaller,
    platform: ThePlatform,
    body: bodies.Refresh | None = None,
) -> Response:
    """Let it run for so long from now at least."""
    lifetime_s = (body or bodies.Refresh()).duration

    async def act(row: tables.Sandbox) -> None:
        _require_awake(row)
        await platform.deadlines.extend(caller, row.sandbox_id, lifetime_s)

    await step(platform, caller, sandbox_id, act)
    return Response(status_code=204)


def _require_awake(row: tables.Sandbox) -> None:
    """What sleeps is not there for a call that is about what runs. Raises NotFound."""
    if row.state == State.PAUSED:
        raise NotFound(f"sandbox {row.sandbox_id} is paused", hint="connect to it first")


# Sleeping, waking, ending.


@router.post("/sandboxes/{sandbox_id}/pause", status_code=204)
async def pause(
    sandbox_id: str,
    caller: TheCaller,
    platform: ThePlatform,
    body: bodies.Pause | None = None,
) -> Response:
    """Write memory and disk to the host's storage; 409 when that is done already."""
    strict = check_pause(body or bodies.Pause())

    async def act(row: tables.Sandbox) -> None:
        if row.state == State.PAUSED:
            raise Conflict(f"sandbox {sandbox_id} is paused already")
        if strict:
            await _require_healthy(platform, caller, sandbox_id)
        await platform.sandboxes.pause(caller, sandbox_id)

    await step(platform, caller, sandbox_id, act)
    return Response(status_code=204)


async def _require_healthy(platform: Platform, caller: Caller, sandbox_id: str) -> None:
    agent = await platform.sandboxes.reach(caller, sandbox_id)
    try:
        await agent.list_processes(sandbox_id)
    except GuestSilent as error:
        raise Unavailable(
            f"the guest agent of sandbox {sandbox_id} does not answer",
            hint="pause it without asking for a healthy guest",
        ) from error


@router.post("/v2/sandboxes/{sandbox_id}/connect", response_model_exclude_none=True)
@router.post(
    "/sandboxes/{sandbox_id}/connect",
    response_model_exclude_none=True,
)
async def connect(
    sandbox_id: str,
    response: Response,
    caller: TheCaller,
    platform: ThePlatform,
    body: bodies.Connect | None = None,
) -> bodies.Sandbox:
    """Let it run for so long from now at least, and wake it if it sleeps (201)."""
    body = body or bodies.Connect()
    needs_memory(body.memory, "resumed")
    lifetime_s = _lifetime(platform, body.timeout)

    async def act(row: tables.Sandbox) -> tables.Sandbox:
        if row.state != State.PAUSED:
            return await platform.deadlines.extend(caller, sandbox_id, lifetime_s)
        woken = await platform.sandboxes.resume(caller, sandbox_id, lifetime_s=lifetime_s)
        response.status_code = 201
        return woken

    return bodies.Sandbox.of(await step(platform, caller, sandbox_id, act), platform)


@router.post("/sandboxes/{sandbox_id}/resume", status_code=201, response_model_exclude_none=True)
async def resume(
    sandbox_id: str,
    caller: TheCaller,
    platform: ThePlatform,
    body: bodies.Resume | None = None,
) -> bodies.Sandbox:
    """Wake it; 409 when it runs. What clients used before there was `connect`."""
    lifetime_s = _lifetime(platform, (body or bodies.Resume()).timeout)

    async def act(row: tables.Sandbox) -> tables.Sandbox:
        return await platform.sandboxes.resume(caller, row.sandbox_id, lifetime_s=lifetime_s)

    return bodies.Sandbox.of(await step(platform, caller, sandbox_id, act), platform)


@router.delete("/sandboxes/{sandbox_id}", status_code=204)
async def kill(sandbox_id: str, caller: TheCaller, platform: ThePlatform) -> Response:
    """End it, whatever it is doing."""
    row = await platform.sandboxes.get(caller, sandbox_id)
    if row.state in {State.STOPPING, State.STOPPED}:
        raise NotFound(f"there is no sandbox {sandbox_id!r}")
    await platform.sandboxes.destroy(caller, sandbox_id)
    return Response(status_code=204)


# Forks.


@router.post("/sandboxes/{sandbox_id}/fork", status_code=201, response_model_exclude_none=True)
async def fork(
    sandbox_id: str,
    caller: TheCaller,
    platform: ThePlatform,
    body: bodies.Fork | None = None,
) -> list[bodies.ForkResult]:
    """Sandboxes that go on from where this one is; each may fail by itself."""
    body = body or bodies.Fork()
    lifetime_s = None if body.timeout is None else _lifetime(platform, body.timeout)

    async def act(row: tables.Sandbox) -> list[bodies.ForkResult]:
        asked = NewChildren(sandbox_id=row.sandbox_id, count=body.count, lifetime_s=lifetime_s)
        children = await platform.sandboxes.fork(caller, asked)
        return [await _result(platform, caller, each) for each in children]

    return await step(platform, caller, sandbox_id, act)


async def _result(platform: Platform, caller: Caller, child: tables.Sandbox) -> bodies.ForkResult:
    if child.state != State.ERROR:
        return bodies.ForkResult(sandbox=bodies.Sandbox.of(child, platform))
    # The client does not learn its id, and so could not end it.
    await platform.sandboxes.destroy(caller, child.sandbox_id)
    return bodies.ForkResult(error=bodies.ForkError(code=500, message=child.reason))
