"""Our few lines of protobuf against the library's: the same bytes, and nothing taken on trust."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from protobuf import Oneof

from sandmartin.errors import SandmartinError, Unavailable
from sandmartin.rpc.hostagent.v1 import hostagent_pb as pb
from sandmartin.transport import Command, Ended, PtySize, Started, Stderr, Stdout
from sandmartin.transport import protobuf as wire
from sandmartin.transport.messages import exec_event, exec_request, file_request

_WORDS = st.text(max_size=200)


def event(kind: Any, value: Any) -> bytes:
    return pb.ExecStreamResponse(event=Oneof(kind, value)).to_binary()


def data(kind: Any, value: bytes) -> bytes:
    return event("data", pb.ExecStreamData(output=Oneof(kind, value)))


@given(
    cmd=_WORDS,
    args=st.lists(_WORDS, max_size=4),
    envs=st.dictionaries(_WORDS, _WORDS, max_size=3),
    stdin=st.booleans(),
    timeout_s=st.none() | st.integers(0, 2**31 - 1),
    pty=st.none() | st.builds(PtySize, st.integers(0, 2**32 - 1), st.integers(0, 300)),
)
def test_a_command_is_what_the_library_reads(
    cmd: str,
    args: list[str],
    envs: dict[str, str],
    stdin: bool,
    timeout_s: int | None,
    pty: PtySize | None,
) -> None:
    command = Command(
        cmd=cmd,
        args=tuple(args),
        envs=envs,
        cwd="/w",
        user=cmd,
        stdin=stdin,
        timeout_s=timeout_s,
        pty=pty,
    )
    expected = pb.ExecStreamRequest(
        sandbox_id="sb1",
        cmd=cmd,
        args=args,
        envs=envs,
        cwd="/w",
        user=cmd,
        stdin=stdin,
        timeout_sec=-1 if timeout_s is None else timeout_s,
        pty=None if pty is None else pb.PtySize(cols=pty.cols, rows=pty.rows),
    )
    assert pb.ExecStreamRequest.from_binary(exec_request("sb1", command)) == expected


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 2**21 + 1])
def test_content_of_any_size_is_what_the_library_reads(size: int) -> None:
    content = os.urandom(size)
    read = pb.StreamInputRequest.from_binary(wire.content(2, content, always=True))
    assert read.content == Oneof("chunk", content)
    meta = wire.content(1, wire.text(1, "sb1") + wire.integer(2, 300), always=True)
    assert pb.StreamInputRequest.from_binary(meta).content == Oneof(
        "meta", pb.StreamInputMeta(sandbox_id="sb1", pid=300)
    )
    chunk = pb.ReadFileStreamResponse(chunk=content).to_binary()
    assert wire.decode(chunk).get(1, b"") == content


def test_a_file_is_asked_for_as_the_library_would() -> None:
    asked = pb.ReadFileStreamRequest(sandbox_id="sb1", path="/ü", user="1000")
    assert file_request("sb1", "/ü", "1000") == asked.to_binary()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (event("start", pb.ExecStreamStart(pid=70_000)), Started(70_000)),
        (data("stdout", b"\0\xff"), Stdout(b"\0\xff")),
        (data("stdout", b""), Stdout(b"")),
        (data("stderr", b"e"), Stderr(b"e")),
        (event("end", pb.ExecStreamEnd()), Ended(exit_code=0)),
        (
            event("end", pb.ExecStreamEnd(exit_code=-3, signal=9, error="ü")),
            Ended(exit_code=-3, signal=9, error="ü"),
        ),
        # Of a newer release: another kind of event, and fields of every type.
        (wire.content(9, b"news"), None),
        (wire.integer(7, 5) + b"\x41" + bytes(8) + b"\x45" + bytes(4), None),
    ],
)
def test_an_event_is_what_the_library_wrote(message: bytes, expected: object) -> None:
    assert exec_event(message) == expected


@pytest.mark.parametrize(
    "message",
    [
        b"\x12\x05ab",
        b"\x12",
        b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x0a" + b"\xff" * 11,
        b"\x41\x01",
        b"\x0b",
        b"\x12\x02\x0a\x05",
    ],
)
def test_what_is_cut_short_or_no_message_is_malformed(message: bytes) -> None:
    with pytest.raises(Unavailable, match="malformed"):
        exec_event(message)


@pytest.mark.parametrize(
    "message", [wire.integer(2, 5), wire.content(1, wire.content(1, b"pid")), wire.integer(3, 1)]
)
def test_a_field_of_another_type_is_refused(message: bytes) -> None:
    with pytest.raises(SandmartinError, match="field"):
        exec_event(message)


@given(st.binary(max_size=60))
def test_no_bytes_do_more_harm_than_a_refusal(message: bytes) -> None:
    try:
        fields = wire.decode(message)
    except ValueError:
        return
    held = sum(len(value) for value in fields.values() if isinstance(value, bytes))
    assert held <= len(message)
