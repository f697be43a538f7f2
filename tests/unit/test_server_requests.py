"""What the agent's door makes of a request before any sandbox sees it, and of an error after."""

from __future__ import annotations

import json
import logging

import pytest
from connectrpc.code import Code
from connectrpc.errors import ConnectError

from sandmartin import errors, model
from sandmartin.agent.guest import Terminal
from sandmartin.agent.server import CODES, ShallowJson, to_connect_error
from sandmartin.agent.service import (
    check_guest_path,
    child_ids_of,
    command_of,
    envs_of,
    spec_of,
    terminal_of,
)
from sandmartin.errors import DiskFull, Invalid, SandmartinError
from sandmartin.rpc.hostagent.v1 import hostagent_pb as pb


def test_every_error_has_a_code_on_the_wire() -> None:
    assert set(CODES) == set(errors.BY_CODE)


def test_defaults_of_a_sandbox() -> None:
    spec = spec_of(pb.CreateSandboxRequest(template="base"), _usual)
    assert spec.sandbox_id.startswith("sb")
    assert (spec.vcpus, spec.memory_mb, spec.disk_size_mb, spec.timeout_s) == (
        model.DEFAULT_VCPUS,
        model.DEFAULT_MEMORY_MB,
        model.DEFAULT_DISK_SIZE_MB,
        0,
    )
    other = spec_of(pb.CreateSandboxRequest(template="base"), _usual)
    assert other.sandbox_id != spec.sandbox_id


def test_a_template_recommends_a_shape() -> None:
    large = model.Shape(vcpus=2, memory_mb=2048)
    shapes = {"large": large, "base": model.Shape()}
    spec = spec_of(pb.CreateSandboxRequest(template="large"), shapes.__getitem__)
    assert (spec.vcpus, spec.memory_mb) == (2, 2048)
    spec = spec_of(pb.CreateSandboxRequest(template="large", memory_mb=256), shapes.__getitem__)
    assert (spec.vcpus, spec.memory_mb) == (2, 256)


def _usual(_template: str) -> model.Shape:
    return model.Shape()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"template": ""},
        {"template": "../../etc"},
        {"template": "base\0"},
        {"template": "base", "sandbox_id": ".."},
        {"template": "base", "sandbox_id": "a/b"},
        {"template": "base", "sandbox_id": "Ä"},
        {"template": "base", "vcpus": -1},
        {"template": "base", "vcpus": 2**31 - 1},
        {"template": "base", "memory_mb": -512},
        {"template": "base", "memory_mb": 1},
        {"template": "base", "disk_size_mb": -1},
        {"template": "base", "timeout_sec": -1},
    ],
)
def test_sandboxes_that_can_never_be(fields: dict[str, object]) -> None:
    with pytest.raises(Invalid):
        spec_of(pb.CreateSandboxRequest(**fields), _usual)  # type: ignore[arg-type]


@pytest.mark.parametrize("envs", [{"": "b"}, {"B=C": "d"}, {"B": "\0"}, {"B\0": ""}])
def test_environments_that_can_never_be(envs: dict[str, str]) -> None:
    with pytest.raises(Invalid, match="envs") as caught:
        envs_of(pb.CreateSandboxRequest(template="base", envs={"SECRET": "hunter2", **envs}))
    assert "hunter2" not in str(caught.value)


def test_command() -> None:
    request = pb.ExecStreamRequest(
        cmd="ls", args=["-l", ""], envs={"A": "b=c"}, cwd="/tmp", user="user", stdin=True
    )
    command = command_of(request)
    assert (command.cmd, command.args, command.envs) == ("ls", ("-l", ""), {"A": "b=c"})
    assert (command.cwd, command.user, command.stdin) == ("/tmp", "user", True)
    assert command.timeout_s == model.DEFAULT_EXEC_TIMEOUT_S
    plain = command_of(pb.ExecRequest(cmd="ls", timeout_sec=-1))
    assert (plain.user, plain.stdin, plain.timeout_s) == ("root", False, None)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"cmd": "a\0b"},
        {"cmd": "a", "args": ["b", "\0"]},
        {"cmd": "a", "cwd": "\0"},
        {"cmd": "a", "user": "\0"},
        {"cmd": "a", "envs": {"B": "\0"}},
        {"cmd": "a", "envs": {"": "b"}},
        {"cmd": "a", "envs": {"B=C": "d"}},
    ],
)
def test_commands_that_can_never_run(fields: dict[str, object]) -> None:
    with pytest.raises(Invalid):
        command_of(pb.ExecRequest(**fields))  # type: ignore[arg-type]


def test_terminal() -> None:
    assert command_of(pb.ExecStreamRequest(cmd="sh")).terminal is None
    request = pb.ExecStreamRequest(cmd="sh", pty=pb.PtySize(cols=80, rows=24))
    assert command_of(request).terminal == Terminal(cols=80, rows=24)
    for cols, rows in ((0, 24), (80, 0), (4097, 24)):
        with pytest.raises(Invalid, match="terminal"):
            terminal_of(pb.PtySize(cols=cols, rows=rows))
    with pytest.raises(Invalid, match="terminal"):
        terminal_of(None)


def test_children_of_a_fork() -> None:
    (one,) = child_ids_of(pb.ForkSandboxRequest())
    assert one.startswith("sb")
    assert len(set(child_ids_of(pb.ForkSandboxRequest(count=3)))) == 3
    assert child_ids_of(pb.ForkSandboxRequest(child_ids=["a", "b"])) == ["a", "b"]
    for fields in (
        {"count": -1},
        {"count": 101},
        {"count": 2, "child_ids": ["a"]},
        {"child_ids": ["a", "a"]},
        {"child_ids": ["../a"]},
        {"child_ids": [""]},
    ):
        with pytest.raises(Invalid):
            child_ids_of(pb.ForkSandboxRequest(**fields))


@pytest.mark.parametrize("path", ["/a", "a", "/a/..b", "/..a/b", "/ä ö", "/" + "a" * 4095])
def test_plain_paths(path: str) -> None:
    assert check_guest_path(path) == path


@pytest.mark.parametrize(
    "path", ["", "/a\0", "..", "/..", "../a", "/a/../b", "/a/..", "/" + "a" * 4096]
)
def test_paths_that_are_refused(path: str) -> None:
    with pytest.raises(Invalid):
        check_guest_path(path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 65,
        '{"a":' * 65,
        '{"args": ["\\\\"], "x": ' + "[" * 64,
        '"\\"" ' + "[" * 65,
        "[" * 10**6,
    ],
)
def test_json_that_is_too_deep(text: str) -> None:
    with pytest.raises(ConnectError, match="deeper than 64"):
        ShallowJson().decode(text.encode(), pb.ExecRequest)


@pytest.mark.parametrize(
    "word", ["[" * 1000, '"[{' * 1000, "\\" + "[" * 1000, "[]" * 1000, '\\"[' * 99]
)
def test_brackets_in_text_are_no_depth(word: str) -> None:
    request = pb.ExecRequest(cmd=word, args=["[", word], envs={word: word})
    codec = ShallowJson()
    assert codec.decode(codec.encode(request), pb.ExecRequest) == request
    escaped = json.dumps({"cmd": word, "args": [word] * 70}).encode()
    assert codec.decode(escaped, pb.ExecRequest).args == [word] * 70


def _info(error: ConnectError) -> pb.ErrorInfo:
    (detail,) = error.details
    assert detail.type_name == "hostagent.v1.ErrorInfo"
    return pb.ErrorInfo.from_binary(detail.message_bytes)


def test_our_errors_leave_with_code_and_hint() -> None:
    sent = to_connect_error(DiskFull("no room", hint="make some"))
    assert (sent.code, sent.message) == (Code.RESOURCE_EXHAUSTED, "no room")
    assert (_info(sent).code, _info(sent).hint) == ("disk_full", "make some")


def test_the_librarys_errors_leave_with_a_code_of_ours() -> None:
    sent = to_connect_error(ConnectError(Code.INVALID_ARGUMENT, "bad frame"))
    assert (sent.code, sent.message) == (Code.INVALID_ARGUMENT, "bad frame")
    assert _info(sent).code == Invalid.code


def test_a_bug_leaves_without_detail(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        sent = to_connect_error(KeyError("secret-token"))
    assert sent.code is Code.INTERNAL
    assert "secret" not in sent.message
    assert _info(sent).code == SandmartinError.code
    (record,) = caplog.records
    assert record.exc_info
