"""What somebody has open ends within a second once they would not be let in any more."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace

import httpx
import pytest
from sqlalchemy import delete, event, update
from websockets.exceptions import ConnectionClosed

from sandmartin.control import tables
from sandmartin.control.caller import Role, Whence
from sandmartin.control.sessions import cookie_name
from tests.control.conftest import add_member, make_user
from tests.control.living import Place
from tests.control.test_streams import b64, data_of, receive, send

pytestmark = pytest.mark.root

#: From the end of a right to the end of what was opened by it.
_WITHIN_S = 1.0


@dataclass
class Visitor:
    """Somebody who was let in, what they send to be, and how they are shut out."""

    headers: dict[str, str]
    shut_out: Callable[[], Awaitable[None]]


async def _team_of(place: Place) -> str:
    async with place.platform.db.read() as session:
        row = await session.get(tables.Sandbox, place.sandbox_id)
    assert row is not None
    return row.team_id


async def by_key(place: Place) -> Visitor:
    """With a key that is revoked."""
    keys = place.platform.keys
    owner = replace(await keys.caller(place.key), role=Role.OWNER)
    row, key = await keys.create(owner, "of a visitor")
    return Visitor({"x-api-key": key}, lambda: keys.revoke(owner, row.key_id))


async def by_key_of_somebody(place: Place) -> Visitor:
    """With a key behind which a user stands who is disabled."""
    visitor = await by_key(place)
    user_id = await make_user(place.platform, f"{time.time()}@example.org")

    async def set_user(**values: object) -> None:
        async with place.platform.db.write() as session:
            key = tables.ApiKey
            await session.execute(
                update(key).where(key.name == "of a visitor").values(created_by=user_id)
            )
            await session.execute(
                update(tables.User).where(tables.User.user_id == user_id).values(values)
            )

    await set_user(active=True)
    return Visitor(visitor.headers, lambda: set_user(active=False))


async def _by_session(place: Place) -> tuple[str, str, dict[str, str]]:
    platform, team_id = place.platform, await _team_of(place)
    user_id = await make_user(platform, f"{time.time()}@example.org")
    await add_member(platform, team_id, user_id, Role.MEMBER)
    token = await platform.sessions.start(user_id, team_id, Whence())
    name = cookie_name(platform.settings.base_url)
    csrf = (await platform.sessions.find(token, Whence())).csrf_token
    headers = {"cookie": f"{name}={token}", "origin": place.url, "x-csrf-token": csrf}
    return user_id, token, headers


async def by_session(place: Place) -> Visitor:
    """By a session, whose user logs out."""
    _, token, headers = await _by_session(place)
    sessions = place.platform.sessions

    async def log_out() -> None:
        await sessions.end(await sessions.find(token, Whence()))

    return Visitor(headers, log_out)


async def by_membership(place: Place) -> Visitor:
    """By a session that goes on for another team, after its user was removed from this one."""
    user_id, token, headers = await _by_session(place)
    platform, team_id = place.platform, await _team_of(place)

    async def remove() -> None:
        member = tables.Member
        async with platform.db.write() as session:
            session.add(tables.Team(team_id=user_id, name="other", created_at=time.time()))
            await session.flush()
            session.add(member(team_id=user_id, user_id=user_id, role="owner", created_at=0.0))
        await platform.sessions.switch(await platform.sessions.find(token, Whence()), user_id)
        async with platform.db.write() as session:
            of = (member.team_id == team_id) & (member.user_id == user_id)
            await session.execute(delete(member).where(of))

    return Visitor(headers, remove)


@contextlib.asynccontextmanager
async def shutting_out(visitor: Visitor) -> AsyncIterator[None]:
    """What is open in the context must end in time after they were shut out."""
    await visitor.shut_out()
    began_at = time.monotonic()
    async with asyncio.timeout(10):
        yield
    assert time.monotonic() - began_at < _WITHIN_S


@pytest.mark.parametrize("let_in", [by_key, by_key_of_somebody, by_session, by_membership])
@pytest.mark.parametrize("path", ["/exec/stream", "/pty"])
async def test_a_socket_ends(
    place: Place, path: str, let_in: Callable[[Place], Awaitable[Visitor]]
) -> None:
    visitor = await let_in(place)
    async with (
        place.socket(path, headers=visitor.headers) as socket,
        place.socket(path) as other,
    ):
        for each in (socket, other):
            await send(each, "start", cmd="cat")
            assert (await receive(each))["type"] in {"start", "started"}
        async with shutting_out(visitor):
            told = await receive(socket)
            assert (told["type"], told["code"], told["fatal"]) == ("error", "unauthenticated", True)
            with pytest.raises(ConnectionClosed) as closed:
                await socket.recv()
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008
        # Whoever else listens goes on.
        kind = "stdin" if path == "/exec/stream" else "input"
        await send(other, kind, data=b64(b"still there\n"))
        assert data_of(await receive(other)).startswith(b"still there")


@pytest.mark.parametrize("let_in", [by_key, by_session])
async def test_a_stream_of_events_ends(
    place: Place, let_in: Callable[[Place], Awaitable[Visitor]]
) -> None:
    visitor = await let_in(place)
    asked = [
        ("GET", f"{place.url}/v1/events", None),
        ("POST", f"{place.url}{place.path}/exec/stream", {"cmd": "sleep", "args": ["30"]}),
    ]
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(httpx.AsyncClient(trust_env=False, timeout=20))
        open_ = []
        for method, url, body in asked:
            streaming = http.stream(method, url, json=body, headers=visitor.headers)
            answer = await stack.enter_async_context(streaming)
            assert answer.status_code == 200
            pieces = answer.aiter_bytes()
            await anext(pieces)
            open_.append(pieces)
        async with shutting_out(visitor):
            for pieces in open_:
                with contextlib.suppress(httpx.RemoteProtocolError):
                    assert [each async for each in pieces] == []


async def test_many_are_looked_after_by_one_question(place: Place) -> None:
    trust, statements = place.platform.trust, []
    owner = await place.platform.keys.caller(place.key)
    engine = place.platform.db.engine.sync_engine

    @event.listens_for(engine, "before_cursor_execute")
    def count(_c: object, _u: object, statement: str, *_: object) -> None:
        statements.append(statement)

    try:
        with contextlib.ExitStack() as stack:
            callers = [replace(owner, actor_id=f"nobody-{number}") for number in range(300)]
            lost = [stack.enter_context(trust.watching(each)) for each in callers]
            known = stack.enter_context(trust.watching(owner))
            await trust._look()
            assert all(each.is_set() for each in lost) and not known.is_set()
            # And the one who comes again after that is not taken for the one before.
            assert not stack.enter_context(trust.watching(callers[0])).is_set()
    finally:
        event.remove(engine, "before_cursor_execute", count)
    asked = [each for each in statements if "api_keys" in each]
    assert 1 <= len(asked) <= 3
