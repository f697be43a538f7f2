"""Commands of a sandbox: in the foreground, in the background, told as events."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from tests.contract.guests import alive, wait_until
from tests.control.living import Place

pytestmark = pytest.mark.root


async def run(place: Place, *words: str, **more: Any) -> dict[str, Any]:
    body = {"cmd": words[0], "args": words[1:], **more}
    answer = await place.http.post(f"{place.path}/exec", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_a_command_runs_to_its_end(place: Place) -> None:
    said = await run(
        place,
        "sh",
        "-c",
        'printf "$X in $PWD"; id -un >&2; exit 7',
        envs={"X": "ü"},
        cwd="/usr",
        user="nobody",
    )
    assert said.pop("duration_ms") >= 0
    assert said == {
        "stdout": "ü in /usr",
        "stderr": "nobody\n",
        "exit_code": 7,
        "encoding": "utf-8",
        "truncated": False,
    }
    assert (await run(place, "sh", "-c", "id -un; pwd"))["stdout"] == "root\n/root\n"
    raw = await run(place, "printf", r"\377")
    assert (raw["encoding"], base64.b64decode(raw["stdout"])) == ("base64", b"\xff")


async def test_what_cannot_end_well_is_told(place: Place) -> None:
    path = f"{place.path}/exec"
    late = await place.http.post(path, json={"cmd": "sleep", "args": ["60"], "timeout_sec": 1})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timed_out")
    missing = await place.http.post(path, json={"cmd": "no-such-command"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (400, "command_not_started")
    for wrong in ({"cmd": ""}, {"cmd": "true", "tag": "7"}, {"cmd": "true", "what": 1}, {}):
        assert (await place.http.post(path, json=wrong)).status_code == 400, wrong


async def test_output_is_kept_up_to_a_bound(place: Place) -> None:
    said = await run(place, "head", "-c", str(20 << 20), "/dev/zero")
    assert (said["exit_code"], said["truncated"]) == (0, True)
    assert len(said["stdout"]) == 16 << 20


async def test_a_background_command_outlives_its_request(place: Place) -> None:
    sleep = {"cmd": "sleep", "args": ["600"], "cwd": "/usr", "tag": "worker"}
    started = await place.http.post(f"{place.path}/exec", json={**sleep, "background": True})
    assert started.status_code == 202
    pid = started.json()["pid"]
    assert started.json() == {"pid": pid, "tag": "worker"}
    listed = (await place.http.get(f"{place.path}/processes")).json()["processes"]
    assert {**sleep, "pid": pid} in listed
    wrong = await place.http.delete(f"{place.path}/processes/worker", params={"signal": "SIGNO"})
    assert wrong.status_code == 400
    ended = await place.http.delete(f"{place.path}/processes/worker", params={"signal": "INT"})
    assert ended.status_code == 204
    wait_until(lambda: not alive(pid))
    for gone in ("worker", str(pid), "0", "99999999999"):
        answer = await place.http.delete(f"{place.path}/processes/{gone}")
        assert answer.status_code == 404, gone


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in text.split("\n\n"):
        if block.strip(":\n"):
            kind, data = block.split("\n")
            found.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


async def test_events_are_told_as_they_happen(place: Place) -> None:
    path = f"{place.path}/exec/stream"
    body = {"cmd": "sh", "args": ["-c", r"printf '\377'; echo no >&2; exit 3"]}
    answer = await place.http.post(path, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    (start, *said, end) = events_of(answer.text)
    assert start[0] == "start" and start[1]["pid"] > 0
    assert sorted(said) == [("stderr", {"data": "bm8K"}), ("stdout", {"data": "/w=="})]
    assert end == ("exit", {"exit_code": 3, "signal": 0, "error": ""})
    late = await place.http.post(path, json={"cmd": "sleep", "args": ["60"], "timeout_sec": 1})
    assert events_of(late.text)[-1][1]["error"]
    missing = await place.http.post(path, json={"cmd": "no-such-command"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (400, "command_not_started")


async def test_who_hangs_up_may_listen_again(place: Place) -> None:
    body = {"cmd": "sh", "args": ["-c", "echo one; sleep 0.2; echo two; sleep 600"], "tag": "again"}
    async with place.http.stream("POST", f"{place.path}/exec/stream", json=body) as answer:
        lines = answer.aiter_lines()
        while "stdout" not in await anext(lines):
            pass
    heard = ""
    stream = f"{place.path}/processes/again/stream"
    async with place.http.stream("GET", stream) as answer:
        async for line in answer.aiter_lines():
            heard += line
            if base64.b64encode(b"two\n").decode() in line:
                break
    assert "event: start" in heard
    ended = await place.http.delete(f"{place.path}/processes/again", params={"signal": "KILL"})
    assert ended.status_code == 204


async def test_only_a_running_sandbox_has_an_inside(place: Place) -> None:
    assert (await place.http.post(f"{place.path}/pause")).status_code == 200
    try:
        for method, path in (("POST", "/exec"), ("POST", "/exec/stream")):
            answer = await place.http.request(method, place.path + path, json={"cmd": "true"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
            assert answer.json()["error"]["hint"] == "resume it first"
    finally:
        assert (await place.http.post(f"{place.path}/resume")).status_code == 200
    capsule = place.path.replace("sandboxes", "capsules")
    again = await place.http.post(f"{capsule}/exec", json={"cmd": "echo", "args": ["hi"]})
    assert again.json()["stdout"] == "hi\n"
