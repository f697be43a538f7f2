"""Built on one host, started on another: real VMs, and a real S3 server between the hosts."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

import pytest

from tests import s3
from tests.e2e.conftest import Agent, Place, agent
from tests.e2e.test_agent_process import states
from tests.e2e.test_hosts import Control, control, run, wait_for

#: Two hosts, a server and several VMs: on a busy machine that takes its time.
pytestmark = [pytest.mark.s3, pytest.mark.timeout(300)]

_COUNT = "n=0; while :; do n=$((n+1)); echo $n >/dev/shm/count; sleep 0.05; done"
_SHAPE = {"memory_mb": 256, "disk_size_mb": 5120}


def joined(
    plane: Control, place: Place, name: str, patch: pytest.MonkeyPatch, stack: ExitStack
) -> Agent:
    """An agent that has become a host."""
    token = json.loads(plane.cli("host", "add", name, "--json"))["token"]
    with patch.context() as only:
        only.setenv("SANDMARTIN_HOST_TOKEN", token)
        words = ("--control", plane.environment["SANDMARTIN_URL"], "--listen", "127.0.0.1:0")
        running = stack.enter_context(agent(place, name, *words))
    wait_for(lambda: plane.hosts()[name]["status"] == "online")
    return running


def count(running: Agent, sandbox_id: str) -> int:
    said = run(running, sandbox_id, "exit $(( $(cat /dev/shm/count) % 200 ))")
    return int(str(said.get("exitCode", 0)))


def moved(source: Agent, target: Agent, plane: Control, sandbox_id: str) -> int:
    """What a sandbox that sleeps on one host has counted to when it wakes up on the other."""
    assert states(source) == {sandbox_id: "paused"}
    plane.cli("host", "drain", "alpha", "--undo")
    plane.cli("host", "drain", "beta")
    answer = plane.http.post(f"/v1/sandboxes/{sandbox_id}/resume")
    assert answer.status_code == 200, answer.text
    assert answer.json()["host_id"] == plane.hosts()["alpha"]["id"]
    return count(target, sandbox_id)


def created(plane: Control, template: str) -> dict[str, Any]:
    """A sandbox of a template, as soon as there can be one."""
    made: dict[str, Any] = {}

    def create() -> bool:
        answer = plane.http.post("/v1/sandboxes", json={**_SHAPE, "template": template})
        made.update(answer.json())
        return answer.status_code == 201

    wait_for(create)
    return made


def test_a_template_of_one_host_goes_on_on_another_with_its_memory(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3.running_server() as server, ExitStack() as stack:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("SANDMARTIN_ARTEFACT_STORE", server.url)
        plane = stack.enter_context(control(place))
        alpha = joined(plane, place, "alpha", monkeypatch, stack)
        made = created(plane, "base")
        mark = "echo on disk > /var/mark; echo in memory > /dev/shm/mark"
        run(alpha, made["id"], f"{mark}; ({_COUNT}) >/dev/null 2>&1 &")
        wait_for(lambda: count(alpha, made["id"]) > 0)
        body = {"sandbox_id": made["id"], "name": "counting"}
        plane.http.post("/v1/snapshots", json=body).raise_for_status()
        plane.http.delete(f"/v1/sandboxes/{made['id']}").raise_for_status()
        wait_for(lambda: any((server.objects / "artefacts").glob("*")))

        beta = joined(plane, place, "beta", monkeypatch, stack)
        plane.cli("host", "drain", "alpha")
        there = created(plane, "counting")
        assert there["host_id"] == plane.hosts()["beta"]["id"]
        for place_of_mark in ("/var/mark", "/dev/shm/mark"):
            found = run(beta, there["id"], f"cat {place_of_mark}")
            assert found.get("stdout"), found
        # The process that counted goes on counting.
        first = count(beta, there["id"])
        wait_for(lambda: count(beta, there["id"]) != first)
        # It sleeps there, and wakes up on the first host when the second is drained.
        plane.http.post(f"/v1/sandboxes/{there['id']}/pause").raise_for_status()
        last = moved(beta, alpha, plane, there["id"])
        wait_for(lambda: count(alpha, there["id"]) != last)
        assert run(alpha, there["id"], "cat /dev/shm/mark").get("stdout")
        assert set(states(alpha)) == {there["id"]} and states(beta) == {}
        for name in ("alpha", "beta"):
            plane.cli("host", "rm", name, "--force")
    for name in ("alpha", "beta", "control"):
        log = (place.path / f"{name}.log").read_text()
        assert server.secret_key not in log and "PRIVATE KEY" not in log
