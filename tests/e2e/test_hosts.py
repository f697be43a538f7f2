"""Three hosts on one machine and one control plane, with real VMs, as operators start them."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import COMMAND, Agent, Place, agent
from tests.e2e.test_agent_process import call, states

_DEADLINE_S = 40.0
_NEW = {"memory_mb": 256, "disk_size_mb": 5120}


@dataclass(frozen=True)
class Control:
    """A control plane as a process, and a client of it."""

    place: Place
    http: httpx.Client
    environment: dict[str, str]

    def cli(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            [*COMMAND, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=self.place.environment | self.environment,
            timeout=90,
            check=False,
            text=True,
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    def hosts(self) -> dict[str, dict[str, Any]]:
        return {each["name"]: each for each in json.loads(self.cli("host", "ls", "--json"))}

    def sandboxes(self) -> dict[str, dict[str, Any]]:
        items = self.http.get("/v1/sandboxes").raise_for_status().json()["items"]
        return {each["id"]: each for each in items}

    def create(self) -> dict[str, Any]:
        answer = self.http.post("/v1/sandboxes", json=_NEW)
        assert answer.status_code == 201, answer.text
        made: dict[str, Any] = answer.json()
        return made


@contextmanager
def control(place: Place) -> Iterator[Control]:
    pace = {"SANDMARTIN_UNREACHABLE_S": "3", "SANDMARTIN_RECONCILE_S": "0.3"}
    log = (place.path / "control.log").open("ab")
    process = subprocess.Popen(
        [*COMMAND, "control", "--json", "--port", "0", "--data-dir", str(place.path / "control")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        env=place.environment | pace,
        start_new_session=True,
    )
    log.close()
    assert process.stdout is not None
    try:
        told = json.loads(process.stdout.readline() or "null")
        assert told, (place.path / "control.log").read_text()
        environment = {"SANDMARTIN_URL": told["url"], "SANDMARTIN_API_KEY": told["api_key"]}
        headers = {"x-api-key": told["api_key"]}
        with httpx.Client(base_url=told["url"], headers=headers, timeout=60) as http:
            yield Control(place, http, environment)
        process.terminate()
        assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.1)


def run(running: Agent, sandbox_id: str, script: str) -> dict[str, object]:
    return call(running, "Exec", sandboxId=sandbox_id, cmd="sh", args=["-c", script])


def test_three_hosts_of_which_one_is_lost_and_comes_back(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("alpha", "beta", "gamma")
    with control(place) as plane, ExitStack() as stack:
        agents: dict[str, Agent] = {}
        for name in names:
            token = json.loads(plane.cli("host", "add", name, "--json"))["token"]
            # Not as a word of the command line, which others see.
            monkeypatch.setenv("SANDMARTIN_HOST_TOKEN", token)
            words = ("--control", plane.environment["SANDMARTIN_URL"], "--listen", "127.0.0.1:0")
            agents[name] = stack.enter_context(agent(place, name, *words))
        monkeypatch.delenv("SANDMARTIN_HOST_TOKEN")
        wait_for(lambda: all(each["status"] == "online" for each in plane.hosts().values()))
        wait_for(lambda: plane.http.get("/v1/templates").json())

        # They spread.
        for _ in range(6):
            plane.create()
        made = plane.sandboxes()
        ids = {each["id"]: name for name, each in plane.hosts().items()}
        homes = {sandbox_id: ids[each["host_id"]] for sandbox_id, each in made.items()}
        assert Counter(homes.values()) == dict.fromkeys(names, 2)
        for sandbox_id, home in homes.items():
            run(agents[home], sandbox_id, f"echo {sandbox_id} > /dev/shm/mark; sleep 600 &")

        # One is lost, and nothing but its own is missing.
        lost = {sandbox_id for sandbox_id, home in homes.items() if home == "beta"}
        agents["beta"].end(signal.SIGKILL)
        wait_for(lambda: _with_status(plane, "missing") == lost)
        assert plane.hosts()["beta"]["status"] == "unreachable"
        assert _with_status(plane, "running") == set(homes) - lost
        more = plane.create()
        homes[more["id"]] = ids[more["host_id"]]
        assert homes[more["id"]] != "beta"

        # It comes back without a token, with its VMs as they were.
        agents["beta"] = stack.enter_context(agent(place, "beta"))
        wait_for(lambda: _with_status(plane, "running") == set(homes))
        for sandbox_id in lost:
            seen = run(agents["beta"], sandbox_id, f"grep -q {sandbox_id} /dev/shm/mark")
            assert "exitCode" not in seen, seen
        there = {name: set(states(each)) for name, each in agents.items()}
        assert there == {
            name: {each for each, home in homes.items() if home == name} for name in names
        }

        # A drained one takes nothing new; one that has sandboxes is not removed by mistake.
        plane.cli("host", "drain", "alpha")
        assert ids[plane.create()["host_id"]] != "alpha"
        refusal = plane.cli("host", "rm", "beta", code=1)
        assert all(each in refusal for each in lost)
        for name in names:
            plane.cli("host", "rm", name, "--force")
            assert agents[name].process.wait(_DEADLINE_S) == 0
            assert not (place.data_dir(name) / "membership.json").exists()
        assert plane.hosts() == {} and plane.sandboxes() == {}
    for name in (*names, "control"):
        log = (place.path / f"{name}.log").read_text()
        assert "PRIVATE KEY" not in log and "smr_" not in log and "smh_" not in log
    assert (place.path / "control" / "secret.key").stat().st_mode & 0o077 == 0


def _with_status(plane: Control, status: str) -> set[str]:
    return {each for each, row in plane.sandboxes().items() if row["status"] == status}
