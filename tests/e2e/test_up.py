"""`sandmartin up` as a user starts it, driven with curl and the key that it prints."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import postgres
from tests.e2e.conftest import COMMAND, Place, agent

_READY_S = 60.0
_END_S = 60.0


@dataclass
class Up:
    """A running `up`."""

    process: subprocess.Popen[bytes]
    url: str
    key: str
    log: Path

    def curl(self, method: str, path: str, *words: str, expect: int = 200) -> bytes:
        command = ["curl", "-sS", "-X", method, "-H", f"X-API-Key: {self.key}", *words]
        command += ["-w", "\n%{http_code}", f"{self.url}/v1{path}"]
        done = subprocess.run(command, capture_output=True, check=True, timeout=120)
        body, _, status = done.stdout.rpartition(b"\n")
        assert int(status) == expect, (method, path, status, body, self.log.read_text()[-2000:])
        return body

    def ask(self, method: str, path: str, body: object = None, expect: int = 200) -> Any:
        words = ["-H", "Content-Type: application/json"]
        words += [] if body is None else ["-d", json.dumps(body)]
        answer = self.curl(method, path, *words, expect=expect)
        return json.loads(answer) if answer else None

    def create(self, **body: object) -> str:
        made = self.ask("POST", "/sandboxes", {"memory_mb": 256, **body}, 201)
        assert made["status"] == "running"
        return f"/sandboxes/{made['id']}"

    def state(self, sandbox: str) -> str:
        return str(self.ask("GET", sandbox)["status"])

    def sh(self, sandbox: str, script: str) -> str:
        said = self.ask("POST", f"{sandbox}/exec", {"cmd": "sh", "args": ["-c", script]})
        assert said["exit_code"] == 0, said
        return str(said["stdout"])

    def end(self) -> str:
        """SIGTERM; what was said."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(_END_S) == 0, self.log.read_text()
        return self.log.read_text()


@contextmanager
def up(place: Place, name: str, *words: str) -> Iterator[Up]:
    """`up` on a data directory of `place`; SIGTERM ends it."""
    data_dir, log = place.data_dir(name), place.path / f"{name}.log"
    with log.open("wb") as said:
        process = subprocess.Popen(
            [*COMMAND, "up", "--json", "--port", "0", "--data-dir", str(data_dir), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            env=place.environment,
            start_new_session=True,
        )
    assert process.stdout is not None
    try:
        announced = process.stdout.readline()
        assert announced, log.read_text()
        told = json.loads(announced)
        assert set(told) == {"url", "api_key", "data_dir"}
        assert told["data_dir"] == str(data_dir)
        yield Up(process, told["url"], told["api_key"], log)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(_END_S)
        process.stdout.close()


def clear(place: Place, *names: str) -> None:
    """Take away the slots that an agent keeps for its next start."""
    for name in names:
        with agent(place, f"{name}/agent") as running:
            call = "http://agent/hostagent.v1.HostAgentService/Terminate"
            command = ["curl", "-sS", "--unix-socket", str(running.socket), call, "-d", "{}"]
            subprocess.run(
                [*command, "-H", "Content-Type: application/json"], check=True, timeout=60
            )
            running.process.wait(_END_S)


# Every other `up` of the tests runs on SQLite.
@pytest.fixture(params=[pytest.param("sqlite", marks=pytest.mark.full), "postgresql"])
def database(request: pytest.FixtureRequest) -> Iterator[Callable[[], list[str]]]:
    """The flags that choose a database."""
    if request.param == "sqlite":
        yield list
        return
    with postgres.running_server() as server:
        url = server.create("sandmartin")
        yield lambda: ["--database-url", url]


def live(up: Up, place: Place) -> None:
    """The whole life of a sandbox, and of what comes of it."""
    labels = {"colour": "sand"}
    first = up.create(metadata=labels, envs={"GREETING": "hi"})
    listed = up.ask("GET", "/sandboxes?metadata=colour=sand")["items"]
    assert [each["metadata"] for each in listed] == [labels]
    assert up.sh(first, 'echo "$GREETING $(id -un)"') == "hi root\n"
    source = place.path / "up.bin"
    source.write_bytes(bytes(range(256)) * 9999)
    up.curl("PUT", f"{first}/files?path=/srv/a/up.bin", "-T", str(source), expect=204)
    form = ("-F", "path=/srv/b.bin", "-F", f"file=@{source}")
    up.curl("POST", f"{first}/files/write", *form, expect=204)
    assert up.sh(first, "cmp /srv/a/up.bin /srv/b.bin && echo same") == "same\n"
    assert up.curl("GET", f"{first}/files?path=/srv/b.bin") == source.read_bytes()
    up.sh(first, "echo kept > /dev/shm/memory")
    assert up.ask("POST", f"{first}/pause")["status"] == "paused"
    up.ask("POST", f"{first}/exec", {"cmd": "true"}, 409)
    assert up.ask("POST", f"{first}/resume")["status"] == "running"
    children = up.ask("POST", f"{first}/fork", {"count": 2}, 201)["items"]
    for each in children:
        assert up.sh(f"/sandboxes/{each['id']}", "cat /dev/shm/memory") == "kept\n"
        up.curl("DELETE", f"/sandboxes/{each['id']}", expect=204)
    checkpoint = up.ask("POST", f"{first}/checkpoints", {"comment": "before"}, 201)["id"]
    up.sh(first, "echo lost > /dev/shm/memory; rm -r /srv/a")
    up.ask("POST", f"{first}/checkpoints/{checkpoint}/rollback")
    assert up.sh(first, "cat /dev/shm/memory; ls /srv/a") == "kept\nup.bin\n"
    up.ask("POST", "/snapshots", {"sandbox_id": first[11:], "name": "mine", "live": True}, 201)
    second = up.create(template="mine")
    assert up.sh(second, "cat /dev/shm/memory") == "kept\n"
    for sandbox in (first, second):
        up.curl("DELETE", sandbox, expect=204)
        assert up.state(sandbox) == "stopped"
    up.curl("DELETE", "/snapshots/mine", expect=204)


def test_the_whole_life_and_a_stop_that_pauses(
    place: Place, database: Callable[[], list[str]]
) -> None:
    with up(place, "data", *database()) as one:
        live(one, place)
        sandbox = one.create()
        counter = "nohup sh -c 'n=0; while :; do n=$((n+1)); echo $n >/dev/shm/n; sleep .1; done'"
        one.sh(sandbox, f"{counter} >/dev/null 2>&1 & echo $! >/dev/shm/pid")
        key = one.key
        assert "1 sandboxes paused" in one.end()
    with up(place, "data", *database()) as again:
        assert again.key == key
        assert again.state(sandbox) == "paused"
        assert again.ask("POST", f"{sandbox}/resume")["status"] == "running"
        # The same process goes on counting.
        script = "kill -0 $(cat /dev/shm/pid); n=$(cat /dev/shm/n)"
        script += '; while [ "$(cat /dev/shm/n)" -le "${n:-0}" ]; do sleep .05; done; echo on'
        assert again.sh(sandbox, script) == "on\n"
        again.curl("DELETE", sandbox, expect=204)
        assert "paused" not in again.end()
    clear(place, "data")


@pytest.mark.full
def test_two_side_by_side_and_what_becomes_of_their_sandboxes(place: Place) -> None:
    with up(place, "one", "--on-exit", "keep") as one, up(place, "two", "--on-exit", "kill") as two:
        kept, killed = one.create(), two.create()
        one.ask("GET", killed, expect=404)
        assert two.sh(killed, "echo two") == "two\n"
        boot_id = one.sh(kept, "sleep 600 >/dev/null 2>&1 & echo $! >/dev/shm/pid; echo $!")
        assert "1 sandboxes killed" in two.end()
        assert "sandboxes" not in one.end()
    with up(place, "one") as one:
        assert one.state(kept) == "running"
        assert one.sh(kept, "kill -0 $(cat /dev/shm/pid) && cat /dev/shm/pid") == boot_id
        one.curl("DELETE", kept, expect=204)
    with up(place, "two") as two:
        assert two.state(killed) == "stopped"
    clear(place, "one", "two")
