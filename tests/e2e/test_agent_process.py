"""The agent as a process: what it survives, what it leaves alone, and who may talk to it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from connectrpc.errors import ConnectError

from sandmartin.rpc.hostagent.v1 import hostagent_pb as pb
from sandmartin.rpc.hostagent.v1.hostagent_connect import HostAgentServiceClient
from tests.e2e.conftest import Agent, Place, agent

_SERVICE = "http://agent/hostagent.v1.HostAgentService"
_DEADLINE_S = 30.0


def call(running: Agent, method: str, **message: object) -> dict[str, object]:
    """A call as curl makes it."""
    command = ["curl", "-sS", "--unix-socket", str(running.socket), f"{_SERVICE}/{method}"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(message)]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def states(running: Agent) -> dict[str, str]:
    sandboxes = call(running, "ListSandboxes").get("sandboxes", [])
    return {each["sandboxId"]: each["status"] for each in sandboxes}  # type: ignore[attr-defined]


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def test_curl_drives_the_agent_and_a_restart_keeps_what_runs(place: Place) -> None:
    with agent(place) as running:
        created = call(running, "CreateSandbox", template="base", sandboxId="sbfirst")
        assert created["status"] == "running"
        ran = call(
            running, "Exec", sandboxId="sbfirst", cmd="sh", args=["-c", "sleep 600 & echo $!"]
        )
        pid = str(_decoded(ran["stdout"])).strip()
        refused = call(running, "Exec", sandboxId="sbfirst", cmd="no-such-command")
        assert refused["code"] == "failed_precondition"
        assert running.end() == 0
    with agent(place) as running:
        assert states(running) == {"sbfirst": "running"}
        # The same processes, and a sandbox that serves as before.
        alive = call(running, "Exec", sandboxId="sbfirst", cmd="kill", args=["-0", pid])
        assert alive.get("exitCode", 0) == 0
        running.end(signal.SIGKILL)
    with agent(place) as running:
        assert states(running) == {"sbfirst": "running"}
        call(running, "Terminate")
        assert running.process.wait(_DEADLINE_S) == 0


def _decoded(text: object) -> str:
    import base64

    return base64.b64decode(str(text)).decode()


def test_two_agents_side_by_side_do_not_touch_each_other(place: Place) -> None:
    with agent(place, "one") as one, agent(place, "two") as two:
        call(one, "CreateSandbox", template="base", sandboxId="sbone")
        call(two, "CreateSandbox", template="base", sandboxId="sbtwo")
        one.end(signal.SIGKILL)
        assert states(two) == {"sbtwo": "running"}
        with agent(place, "one") as again:
            assert states(again) == {"sbone": "running"}
            for each, name in ((again, "sbone"), (two, "sbtwo")):
                assert "exitCode" not in call(each, "Exec", sandboxId=name, cmd="true")
            call(again, "Terminate")
        assert states(two) == {"sbtwo": "running"}
        assert "exitCode" not in call(two, "Exec", sandboxId="sbtwo", cmd="true")
        call(two, "Terminate")


def test_a_data_directory_has_one_agent(place: Place) -> None:
    with agent(place) as running:
        second = place.run("agent")
        assert second.returncode == 1
        assert b"another agent is running" in second.stderr and b"hint:" in second.stderr
        call(running, "Terminate")


#: Runs an agent's core that kills itself at a step of a create.
_SUICIDE = """
import asyncio, os, signal, sys
from dataclasses import replace
from sandmartin.agent.host import Host
from sandmartin.agent.machine import open_machine
from sandmartin.model import SandboxSpec, Settings

async def main():
    def step(name):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGKILL)
    async with open_machine(Settings.load()) as machine:
        host = Host(replace(machine, step=step))
        await host.open()
        await host.create(SandboxSpec(sandbox_id="sbhalf", template="base"), {})
        await host.destroy("sbhalf")

asyncio.run(main())
"""


@pytest.mark.parametrize("step", ["create:started", "create:confirmed", "destroy:killed"])
def test_a_killed_agent_leaves_nothing_after_the_next_start(place: Place, step: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SUICIDE, step],
        env=place.environment,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert place.left(), "nothing was left to clean up: the test proves nothing"
    with agent(place) as running:
        assert states(running) == {}
        assert not [each for each in place.left() if "process" in each and "sandboxes" in each]
        call(running, "Terminate")


def test_another_user_is_kept_from_the_socket(place: Place) -> None:
    with agent(place) as running:
        assert running.socket.stat().st_mode & 0o007 == 0
        as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
        curl = ["curl", "-sS", "--unix-socket", str(running.socket), f"{_SERVICE}/Terminate"]
        refused = subprocess.run([*as_nobody, *curl], capture_output=True, timeout=30)
        assert refused.returncode == 7, refused
        assert states(running) == {}
        call(running, "Terminate")


async def test_the_stock_connect_client_drives_the_agent(place: Place) -> None:
    with agent(place) as running:
        # Its HTTP client speaks TCP alone, so a forwarder on loopback stands before the socket.
        forwarders: set[asyncio.Task[None]] = set()

        def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            forwarders.add(asyncio.create_task(_forward(running.socket, reader, writer)))

        server = await asyncio.start_server(forward, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, HostAgentServiceClient(f"http://127.0.0.1:{port}") as client:
            created = await client.create_sandbox(pb.CreateSandboxRequest(template="base"))
            name = created.sandbox_id
            words = ["-c", "echo out; exit 3"]
            request = pb.ExecStreamRequest(sandbox_id=name, cmd="sh", args=words)
            events = [event.event async for event in client.exec_stream(request)]
            assert [event.field for event in events if event] == ["start", "data", "end"]
            end = events[-1]
            assert end is not None and end.field == "end" and end.value.exit_code == 3
            with pytest.raises(ConnectError, match="no such file"):
                await client.read_file(pb.ReadFileRequest(sandbox_id=name, path="/none"))
            await client.destroy_sandbox(pb.DestroySandboxRequest(sandbox_id=name))
        for forwarder in forwarders:
            forwarder.cancel()
        await asyncio.wait(forwarders)
        await asyncio.to_thread(call, running, "Terminate")


async def _forward(
    socket: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    there, back = await asyncio.open_unix_connection(socket)

    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            target.write(data)
            await target.drain()
        target.close()
        await target.wait_closed()

    try:
        await asyncio.gather(pump(reader, back), pump(there, writer), return_exceptions=True)
    finally:
        back.close()
        writer.close()


def test_doctor_tells_what_this_machine_can_do(place: Place) -> None:
    done = place.run("doctor", "--json")
    findings = {each["name"]: each for each in json.loads(done.stdout)}
    assert findings, done
    for finding in findings.values():
        assert finding["ok"] or finding["remedy"], finding
    assert os.geteuid() == 0
