"""What listens in a sandbox, asked over the API."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx
import pytest

from sandmartin.control.api import ports
from sandmartin.control.listeners import MOST_BYTES
from sandmartin.errors import NotFound
from sandmartin.relay.target import GUEST_PORT
from sandmartin.transport.agent import Agent
from tests.control.living import Place

pytestmark = [pytest.mark.root, pytest.mark.one_database]


async def listed(place: Place) -> list[dict[str, Any]]:
    answer = await place.http.get(f"{place.path}/ports")
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["ports"]
    return found


@contextlib.contextmanager
def lies(
    monkeypatch: pytest.MonkeyPatch, *pieces: bytes, endless: bool = False
) -> Iterator[list[int]]:
    """Each of the tables is what a guest makes up; what was taken of it."""
    taken: list[int] = []

    async def read_file(
        self: Agent, sandbox_id: str, path: str, user: str = ""
    ) -> AsyncGenerator[bytes, None]:
        if path.endswith("6"):
            raise NotFound("no IPv6 here")
        while True:
            for piece in pieces:
                taken.append(len(piece))
                yield piece
            if not endless:
                return
            await asyncio.sleep(0)

    with monkeypatch.context() as patched:
        patched.setattr(Agent, "read_file", read_file)
        yield taken


async def test_what_listens_is_listed(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as inner, socket.create_server(("", 0)) as outer:
        found = await listed(place)
        port = inner.getsockname()[1]
        assert {"port": port, "address": "127.0.0.1", "loopback": True} in found
        port = outer.getsockname()[1]
        assert {"port": port, "address": "0.0.0.0", "loopback": False} in found
        assert [each["port"] for each in found] == sorted(each["port"] for each in found)
    assert port not in {each["port"] for each in await listed(place)}


async def test_the_guest_agent_is_none_of_them(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = f"   0: 00000000:{GUEST_PORT:04X} 00000000:0000 0A \n".encode()
    with lies(monkeypatch, table, table.replace(b"C33F", b"1F90")):
        assert await listed(place) == [{"port": 8080, "address": "0.0.0.0", "loopback": False}]


async def test_a_guest_that_talks_without_end_is_heard_for_a_while(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lies(monkeypatch, b"<script>" * 8192, endless=True) as taken:
        assert await listed(place) == []
    assert sum(taken) <= MOST_BYTES


async def test_a_guest_that_says_nothing_is_not_waited_for(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "_READ_S", 0.2)
    with lies(monkeypatch, b"", endless=True):
        answer = await place.http.get(f"{place.path}/ports")
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timed_out")


async def test_only_of_ones_own_sandbox_that_is_there(place: Place) -> None:
    async with httpx.AsyncClient(base_url=place.url, trust_env=False) as stranger:
        assert (await stranger.get(f"{place.path}/ports")).status_code == 401
    assert (await place.http.get("/v1/sandboxes/sbnone/ports")).status_code == 404
