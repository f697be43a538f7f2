"""The guests' resolver against an upstream of our own, on loopback."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import dns.flags
import dns.message
import dns.rcode
import pytest

from sandmartin.agent.network.resolver import Upstream, _Rate
from tests.world import PUBLIC_SERVER, Internet


@pytest.fixture
async def internet(sockets: tuple[socket.socket, socket.socket]) -> AsyncIterator[Internet]:
    """A name server on a port of loopback."""
    internet = Internet()
    await internet.serve_names(*sockets)
    yield internet
    await internet.close()


@pytest.fixture
def upstream(tmp_path: Path, free_port: int) -> Upstream:
    configuration = tmp_path / "resolv.conf"
    configuration.write_text("nameserver 127.0.0.1\n")
    return Upstream(configuration, free_port)


def question(name: str) -> dns.message.Message:
    return dns.message.make_query(name, "A")


async def ask(upstream: Upstream, query: dns.message.Message, *, tcp: bool) -> dns.message.Message:
    answer = await upstream.answer(query.to_wire(), tcp=tcp)
    assert answer is not None
    return dns.message.from_wire(answer)


@pytest.mark.parametrize("tcp", [False, True])
async def test_a_question_is_answered_under_its_own_number(
    internet: Internet, upstream: Upstream, tcp: bool
) -> None:
    query = question("example.com")
    answer = await ask(upstream, query, tcp=tcp)
    assert answer.id == query.id
    assert PUBLIC_SERVER in answer.answer[0].to_text()


async def test_what_is_too_large_for_a_datagram_comes_by_tcp(
    internet: Internet, upstream: Upstream
) -> None:
    query = question("big.example.com")
    by_udp = await ask(upstream, query, tcp=False)
    assert by_udp.flags & dns.flags.TC
    by_tcp = await ask(upstream, query, tcp=True)
    assert len(by_tcp.answer[0]) == 150


@pytest.mark.parametrize("wire", [b"", b"x", bytes(12), b"\xff" * 600, bytes(3000)])
async def test_what_is_no_question_gets_no_answer(
    internet: Internet, upstream: Upstream, wire: bytes
) -> None:
    await upstream.answer(wire, tcp=False)
    assert not internet.queries


async def test_an_answer_is_not_taken_for_a_question(
    internet: Internet, upstream: Upstream
) -> None:
    query = question("example.com")
    query.flags |= dns.flags.QR
    assert await upstream.answer(query.to_wire(), tcp=False) is None


async def test_a_missing_upstream_is_a_failure_that_dns_knows(upstream: Upstream) -> None:
    answer = await ask(upstream, question("example.com"), tcp=True)
    assert answer.rcode() == dns.rcode.SERVFAIL


async def test_the_next_server_is_asked_and_changes_are_seen(
    internet: Internet, tmp_path: Path, free_port: int
) -> None:
    configuration = tmp_path / "resolv.conf"
    configuration.write_text("nameserver 127.0.0.9\nnameserver 127.0.0.1\n")
    upstream = Upstream(configuration, free_port)
    assert (await ask(upstream, question("example.com"), tcp=True)).answer
    configuration.write_text("nameserver 127.0.0.9\n# changed\n")
    assert upstream.servers() == ["127.0.0.9"]


def test_a_burst_is_granted_and_no_more() -> None:
    rate = _Rate()
    assert 200 <= sum(rate.take() for _ in range(1000)) < 400


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two sockets on the same port of loopback, for UDP and TCP."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
    ):
        udp.bind(("127.0.0.1", 0))
        tcp.bind(udp.getsockname())
        yield udp, tcp


@pytest.fixture
def free_port(sockets: tuple[socket.socket, socket.socket]) -> int:
    """Their port; nothing answers there unless `internet` is asked for too."""
    port: int = sockets[0].getsockname()[1]
    return port
