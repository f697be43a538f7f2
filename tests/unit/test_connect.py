"""The Connect client against peers that break the protocol or lie in it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sandmartin import errors
from sandmartin.errors import SandmartinError, TimedOut, Unavailable
from sandmartin.rpc.hostagent.v1 import hostagent_pb as pb
from sandmartin.transport import Command, Started, Stdout
from sandmartin.transport import protobuf as wire
from sandmartin.transport.agent import AgentSocket
from sandmartin.transport.connect import (
    MAX_FRAME_BYTES,
    FrameReader,
    encode_frame,
    error_from_body,
)

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], AsyncIterator[bytes]]


def frame(body: bytes, flags: int = 0, length: int | None = None) -> bytes:
    return bytes([flags]) + (len(body) if length is None else length).to_bytes(4, "big") + body


def error_body(code: str, info: pb.ErrorInfo) -> dict[str, object]:
    value = base64.b64encode(info.to_binary()).decode().rstrip("=")
    return {
        "code": code,
        "message": "a sentence",
        "details": [{"type": "hostagent.v1.ErrorInfo", "value": value}],
    }


#: How a stream of events begins.
STARTED = encode_frame(wire.content(1, wire.integer(1, 7)))


def read(*pieces: bytes) -> list[bytes]:
    reader = FrameReader(max_frame_bytes=1000)
    return [message for piece in pieces for message in reader.feed(piece)]


# Frames.


def test_frames_come_whole_however_they_are_cut() -> None:
    messages = [b"a", b"", b"b" * 400, b"c"]
    stream = b"".join(map(encode_frame, messages)) + frame(b"{}", flags=2)
    for size in (1, 2, 7, 410, len(stream)):
        reader = FrameReader()
        pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
        assert [each for piece in pieces for each in reader.feed(piece)] == messages
        assert reader.ended


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (frame(b"", length=1001), "1001 bytes"),
        (frame(b"{}", length=2**32 - 1), "4294967295 bytes"),
        (frame(b"{}", flags=1), "flags 0x01"),
        (frame(b"{}", flags=0x80), "flags 0x80"),
        (frame(b"{]", flags=2), "not JSON"),
        (frame(b"\xff\xfe", flags=2), "not JSON"),
        (frame(b"[1]", flags=2), "not a JSON object"),
        (frame(b"[" * 900, flags=2), "not JSON"),
        (frame(b"{}", flags=2) + frame(b"{}"), "follows the end"),
        (b"<html>502 Bad Gateway</html>", "bytes"),
    ],
)
def test_what_is_no_stream_of_messages_is_refused(stream: bytes, says: str) -> None:
    with pytest.raises(Unavailable, match=says) as refused:
        read(stream)
    assert refused.value.hint


def test_an_oversized_frame_is_refused_by_its_head_alone() -> None:
    reader = FrameReader()
    with pytest.raises(Unavailable):
        list(reader.feed(b"\0" + (MAX_FRAME_BYTES + 1).to_bytes(4, "big")))


def test_the_end_frame_raises_what_it_reports_after_the_messages_before_it() -> None:
    end = {"error": error_body("resource_exhausted", pb.ErrorInfo(code="disk_full", hint="tidy"))}
    reader = FrameReader()
    messages = reader.feed(frame(b"a") + frame(json.dumps(end).encode(), flags=2))
    assert next(messages) == b"a"
    with pytest.raises(errors.DiskFull, match="a sentence") as full:
        next(messages)
    assert full.value.hint == "tidy"


# Errors.


@pytest.mark.parametrize("cls", errors.BY_CODE.values())
def test_every_error_of_ours_is_rebuilt_with_its_hint(cls: type[SandmartinError]) -> None:
    body = error_body("unknown", pb.ErrorInfo(code=cls.code, hint="do this " * 40))
    rebuilt = error_from_body(body)
    assert type(rebuilt) is cls
    assert (rebuilt.message, rebuilt.hint) == ("a sentence", "do this " * 40)


@pytest.mark.parametrize(
    "details",
    [
        None,
        7,
        "text",
        [None, 3, []],
        [{"type": "hostagent.v1.ErrorInfo"}],
        [{"type": "hostagent.v1.ErrorInfo", "value": "ü"}],
        [{"type": "hostagent.v1.ErrorInfo", "value": "A"}],
        [
            {
                "type": "hostagent.v1.ErrorInfo",
                "value": base64.b64encode(b"\x0a" + b"\xff" * 99).decode(),
            }
        ],
        [{"type": "somebody.Else", "value": "CgRkaXNr"}],
    ],
)
def test_without_a_usable_detail_the_connect_code_decides(details: object) -> None:
    error = error_from_body({"code": "not_found", "message": "gone", "details": details})
    assert type(error) is errors.NotFound
    assert error.message == "gone"


def test_a_code_of_a_newer_release_means_what_the_connect_code_says() -> None:
    error = error_from_body(error_body("not_found", pb.ErrorInfo(code="of_the_future", hint="h")))
    assert (type(error), error.hint) == (errors.NotFound, "h")
    error = error_from_body(error_body("of_the_future", pb.ErrorInfo(hint="h")))
    assert (type(error), error.hint) == (SandmartinError, "h")


@pytest.mark.parametrize("body", [None, [], {}, {"code": 5}, "text"])
def test_a_body_that_is_no_error_names_the_status(body: object) -> None:
    error = error_from_body(body, 502)
    assert type(error) is Unavailable
    assert "502" in error.message


# Over a socket.


@asynccontextmanager
async def peer(path: Path, answer: Answer) -> AsyncGenerator[AgentSocket, None]:
    """A client of a peer that answers each request with the bytes of `answer` and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            async for piece in answer(reader, writer):
                writer.write(piece)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_unix_server(serve, path):
        client = AgentSocket(path)
        try:
            yield client
        finally:
            await client.aclose()


def http(body: bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\ncontent-length: {length}\r\n\r\n".encode() + body


def saying(*pieces: bytes) -> Answer:
    async def answer(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    return answer


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (http(b"<html>", "502 Bad Gateway"), "HTTP 502"),
        (http(b"", "302 Found"), "HTTP 302"),
        (http(b"<html>"), "not JSON"),
        (http(b"[]"), "not a JSON object"),
        (http(b'{"sandboxes":', length=500), "lost"),
        (http(b"x" * (MAX_FRAME_BYTES + 1)), "longer than"),
        (b"SSH-2.0-OpenSSH\r\n", "lost"),
        (b"", "lost"),
    ],
)
async def test_a_call_answered_by_anything_else_is_unavailable(
    tmp_path: Path, answer: bytes, says: str
) -> None:
    async with peer(tmp_path / "s", saying(answer)) as client:
        with pytest.raises(Unavailable, match=says):
            await client.list_sandboxes()


async def test_a_call_raises_the_error_in_its_body(tmp_path: Path) -> None:
    body = error_body("failed_precondition", pb.ErrorInfo(code="exhausted", hint="less"))
    answer = http(json.dumps(body).encode(), "412 Precondition Failed")
    async with peer(tmp_path / "s", saying(answer)) as client:
        with pytest.raises(errors.Exhausted) as refused:
            await client.ping("sb1")
    assert refused.value.hint == "less"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        # The head promises more than comes; a whole answer without the end frame.
        (http(STARTED, length=500), Unavailable),
        (http(STARTED), Unavailable),
        (http(STARTED + frame(b"{}", length=99)), Unavailable),
        (http(STARTED + frame(b"{}", flags=9)), Unavailable),
        (http(STARTED + encode_frame(wire.integer(2, 5))), SandmartinError),
        (
            http(STARTED + encode_frame(wire.content(2, b"\x0a\x09x"))),
            Unavailable,
        ),
        (
            http(STARTED + encode_frame(wire.content(3, wire.text(1, "x")))),
            SandmartinError,
        ),
        (
            http(STARTED + frame(b'{"error":{"code":"deadline_exceeded"}}', flags=2)),
            TimedOut,
        ),
    ],
)
async def test_a_cut_or_broken_stream_never_looks_complete(
    tmp_path: Path, answer: bytes, error: type[SandmartinError]
) -> None:
    events = []
    async with peer(tmp_path / "s", saying(answer)) as client:
        with pytest.raises(error) as raised:
            async for event in client.exec_stream("sb1", Command(cmd="true")):
                events.append(event)
    assert events == [Started(7)]
    assert type(raised.value) is error


async def test_events_arrive_while_the_stream_lasts(tmp_path: Path) -> None:
    heard = asyncio.Event()

    async def answer(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> AsyncIterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n"
        # An event of a kind that this release does not know is passed over.
        yield STARTED + encode_frame(wire.content(9, b"news"))
        yield encode_frame(wire.content(2, wire.content(1, b"hi")))
        await heard.wait()

    async with peer(tmp_path / "s", answer) as client:
        events = client.exec_stream("sb1", Command(cmd="true"))
        async with asyncio.timeout(10):
            assert [await anext(events), await anext(events)] == [Started(7), Stdout(b"hi")]
        await events.aclose()
        heard.set()


async def test_a_deadline_is_for_the_whole_call(tmp_path: Path) -> None:
    async def trickle(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> AsyncIterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n"
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    async with peer(tmp_path / "s", trickle) as client:
        with pytest.raises(TimedOut, match="PingSandbox"):
            await client._channel.unary("PingSandbox", {}, deadline_s=0.2)


async def test_a_refusal_before_the_upload_is_read_still_arrives(tmp_path: Path) -> None:
    end = frame(b'{"error":{"code":"not_found","message":"no such command"}}', flags=2)

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 100_000

    async with peer(tmp_path / "s", saying(http(end))) as client, asyncio.timeout(20):
        with pytest.raises(errors.NotFound, match="no such command"):
            await client.send_stdin("sb1", 7, endless())
