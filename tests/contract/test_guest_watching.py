"""Watching directories in the guest, as the stock SDKs do: by asking, and by a stream."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.contract.guests import (
    ME,
    MIB,
    STREAM,
    TOKEN,
    RunningAgent,
    framed,
    stream,
    wait_until,
)

WATCH = "filesystem.Filesystem/WatchDir"


def call(sdk: httpx.Client, method: str, **message: Any) -> httpx.Response:
    return sdk.post(f"/filesystem.Filesystem/{method}", json=message)


def shown(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(each["type"].removeprefix("EVENT_TYPE_"), each["name"]) for each in events]


def ask(sdk: httpx.Client, watcher: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = (
        call(sdk, "GetWatcherEvents", watcherId=watcher).json().get("events", [])
    )
    return events


def upload(sdk: httpx.Client, path: Path) -> None:
    form = {"file": (os.fspath(path), b"small")}
    answer = sdk.post("/files", params={"path": os.fspath(path), "username": ME}, files=form)
    assert answer.status_code == 200


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    return tmp_path


def test_one_upload_is_three_events(sdk: httpx.Client, tree: Path) -> None:
    watcher = call(sdk, "CreateWatcher", path=os.fspath(tree)).json()["watcherId"]
    upload(sdk, tree / "file")
    three = [("CREATE", "file"), ("CHMOD", "file"), ("WRITE", "file")]
    assert shown(ask(sdk, watcher)) == three
    assert ask(sdk, watcher) == []
    upload(sdk, tree / "file")
    assert set(shown(ask(sdk, watcher))) == {("WRITE", "file")}
    upload(sdk, tree / "a" / "below")
    assert ask(sdk, watcher) == []
    assert call(sdk, "RemoveWatcher", watcherId=watcher).json() == {}
    for method in ("GetWatcherEvents", "RemoveWatcher"):
        gone = call(sdk, method, watcherId=watcher)
        assert (gone.status_code, gone.json()["code"]) == (404, "not_found")


def test_a_tree_and_what_is_made_in_it(sdk: httpx.Client, tree: Path) -> None:
    asked = {"path": os.fspath(tree), "recursive": True, "includeEntry": True}
    watcher = call(sdk, "CreateWatcher", **asked).json()["watcherId"]
    call(sdk, "MakeDir", path=f"{tree}/b/c")
    upload(sdk, tree / "b" / "c" / "file")
    (tree / "a" / "x").write_text("12345")
    told = ask(sdk, watcher)
    made = {("CREATE", name) for name in ("b", "b/c", "b/c/file", "a/x")}
    assert made | {("WRITE", "b/c/file"), ("WRITE", "a/x")} <= set(shown(told))
    assert len([each for each in shown(told) if each[0] == "CREATE"]) == len(made)
    (written,) = (each for each in told if shown([each]) == [("WRITE", "a/x")])
    assert (written["entry"]["path"], written["entry"]["size"]) == (f"{tree}/a/x", "5")
    shutil.rmtree(tree / "b")
    gone = [("REMOVE", name) for name in ("b/c/file", "b/c", "b")]
    assert shown(ask(sdk, watcher)) == gone
    call(sdk, "RemoveWatcher", watcherId=watcher)


def messages(chunks: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    buffer = b""
    for chunk in chunks:
        buffer += chunk
        while len(buffer) >= 5:
            end = 5 + struct.unpack_from(">BI", buffer)[1]
            if len(buffer) < end:
                break
            yield json.loads(buffer[5:end])
            buffer = buffer[end:]


def watchers_of(agent: RunningAgent) -> int:
    links = Path(f"/proc/{agent.pid}/fd").iterdir()
    return sum("inotify" in str(each.readlink()) for each in links)


def test_a_stream_tells_its_start_events_and_that_it_lives(
    agent: RunningAgent, sdk: httpx.Client, tree: Path
) -> None:
    before = watchers_of(agent)
    headers = {"content-type": STREAM, "keepalive-ping-interval": "1"}
    content = framed({"path": os.fspath(tree), "recursive": True})
    with sdk.stream("POST", f"/{WATCH}", content=content, headers=headers) as answer:
        told = messages(answer.iter_raw())
        assert next(told) == {"start": {}}
        assert watchers_of(agent) == before + 1
        (tree / "a" / "file").mkdir()
        event = {"name": "a/file", "type": "EVENT_TYPE_CREATE"}
        assert next(told) == {"filesystem": event}
        assert next(told) == {"keepalive": {}}
    wait_until(lambda: watchers_of(agent) == before)


def test_a_stream_ends_when_its_directory_goes_or_its_time_is_over(
    sdk: httpx.Client, tree: Path
) -> None:
    asked = {"path": f"{tree}/a"}
    late = stream(sdk, WATCH, asked, connect_timeout_ms="200")
    assert late[-1]["error"]["code"] == "deadline_exceeded"
    headers = {"content-type": STREAM}
    with sdk.stream("POST", f"/{WATCH}", content=framed(asked), headers=headers) as answer:
        told = messages(answer.iter_raw())
        assert next(told) == {"start": {}}
        (tree / "a").rmdir()
        gone = {"name": ".", "type": "EVENT_TYPE_REMOVE"}
        assert list(told) == [{"filesystem": gone}, {}]


@pytest.mark.parametrize(
    ("path", "code"),
    [("none", "not_found"), ("file", "invalid_argument"), ("a\0b", "invalid_argument")],
)
def test_what_cannot_be_watched(sdk: httpx.Client, tree: Path, path: str, code: str) -> None:
    (tree / "file").touch()
    asked = {"path": f"{tree}/{path}"}
    assert call(sdk, "CreateWatcher", **asked).json()["code"] == code
    assert stream(sdk, WATCH, asked)[-1]["error"]["code"] == code


def test_a_client_that_does_not_read_makes_nothing_grow_and_is_told(
    agent: RunningAgent, tree: Path
) -> None:
    """What it does not take stays in the kernel, until that has enough."""
    before = watchers_of(agent)
    content = framed({"path": os.fspath(tree), "includeEntry": True})
    head = f"POST /{WATCH} HTTP/1.1\r\nHost: guest\r\nContent-Type: {STREAM}\r\n"
    head += f"X-Access-Token: {TOKEN}\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection((agent.host, agent.port)) as connection:
        connection.settimeout(20)
        connection.sendall(head.encode() + content)
        wait_until(lambda: watchers_of(agent) == before + 1)
        agent.forget_peak()
        used = agent.peak_bytes()
        names = [tree / (letter * 200) for letter in "xy"]
        for name in names:
            name.touch()
        most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
        for n in range(2 * most + 20_000):
            names[n % 2].chmod(0o600)
        assert agent.peak_bytes() - used < 24 * MIB
        told = b""
        while b'"data_loss"' not in told:
            chunk = connection.recv(MIB)
            assert chunk
            told = told[-100:] + chunk
    wait_until(lambda: watchers_of(agent) == before)
