"""The agent's door over its real socket, driven as anybody would: plain HTTP and JSON."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import httpx
import pytest

from sandmartin import errors
from sandmartin.agent.guest import Command, Ended, Output, ProcessEvent, Started
from sandmartin.agent.server import CODES, serve_machine
from sandmartin.agent.service import MAX_MESSAGE_BYTES
from sandmartin.agent.vmm import VmStatus
from sandmartin.errors import SandmartinError
from sandmartin.rpc.hostagent.v1.hostagent_connect import HostAgentService
from sandmartin.transport.connect import error_from_body
from tests.fakes_agent import IMAGE_MB, Fakes, find_leaks, find_vms, make_machine
from tests.waiting import until

pytestmark = pytest.mark.qemu_img

SERVICE = "hostagent.v1.HostAgentService"
STREAMS_IN = {"ImportArchive", "WriteFileStream", "StreamInput", "WriteTemplate", "WriteTree"}
STREAMS_OUT = {
    *("ConnectProcess", "ExecStream", "ImportImage", "ReadFileStream", "ReadTemplate", "ReadTree"),
    *("PushTemplate", "PushSandbox"),
}
SMALL = {"template": "base", "memoryMb": 128, "diskSizeMb": IMAGE_MB}
DEADLINE_S = 20.0


@dataclass
class Agent:
    """An agent of fakes that serves, and a plain HTTP client of it."""

    fakes: Fakes
    socket: Path
    http: httpx.AsyncClient
    serving: asyncio.Task[None]

    async def post(
        self, method: str, content: bytes, content_type: str = "application/json", **headers: str
    ) -> httpx.Response:
        sent = {"content-type": content_type, **headers}
        return await self.http.post(f"/{SERVICE}/{method}", content=content, headers=sent)

    async def call(self, method: str, **message: Any) -> Any:
        """A unary call's answer. Raises the error that the agent answered."""
        response = await self.post(method, json.dumps(message).encode())
        if response.status_code != 200:
            raise error_from_body(response.json(), response.status_code)
        return response.json()

    async def stream(self, method: str, *messages: dict[str, Any]) -> list[Any]:
        """A stream's messages. Raises the error that its end frame carries."""
        content = b"".join(frame(json.dumps(message).encode()) for message in messages)
        response = await self.post(method, content, "application/connect+json")
        assert response.status_code == 200
        *answers, (flags, end) = list(frames(response.content))
        assert flags == 2
        if "error" in end:
            raise error_from_body(end["error"])
        return [answer for _, answer in answers]

    async def listed(self) -> list[Any]:
        found: list[Any] = (await self.call("ListSandboxes"))["sandboxes"]
        return found

    async def create(self, sandbox_id: str = "sb1", **fields: Any) -> Any:
        return await self.call("CreateSandbox", sandboxId=sandbox_id, **SMALL | fields)


def frame(body: bytes, flags: int = 0) -> bytes:
    return bytes([flags]) + len(body).to_bytes(4, "big") + body


def frames(content: bytes) -> Iterator[tuple[int, Any]]:
    """Flags and message of each frame, of which nothing may be left over."""
    at = 0
    while at < len(content):
        flags, size = content[at], int.from_bytes(content[at + 1 : at + 5], "big")
        body = content[at + 5 : at + 5 + size]
        assert len(body) == size
        at += 5 + size
        yield flags, json.loads(body)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


@asynccontextmanager
async def agent_on(fakes: Fakes) -> AsyncIterator[Agent]:
    """An agent of `fakes`; at the end it is terminated unless it has ended."""
    ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(serve_machine(fakes.machine, announce=ready.set_result))
    await asyncio.wait({serving, ready}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    path = fakes.machine.settings.socket
    assert ready.result() == {"socket": os.fspath(path), "pid": os.getpid()}
    transport = httpx.AsyncHTTPTransport(uds=os.fspath(path))
    client = httpx.AsyncClient(transport=transport, base_url="http://agent", timeout=DEADLINE_S)
    async with client as http:
        try:
            yield Agent(fakes, path, http, serving)
        finally:
            if not serving.done():
                await http.post(f"/{SERVICE}/Terminate", json={})
            async with asyncio.timeout(DEADLINE_S):
                await serving
            fakes.machine.data.close()


@pytest.fixture
async def agent(directory: Path) -> AsyncIterator[Agent]:
    async with agent_on(make_machine(directory)) as agent:
        yield agent
    assert not find_leaks(directory)
    assert not agent.socket.exists()


# What it is for.


async def test_life_of_a_sandbox(agent: Agent) -> None:
    made = await agent.create(timeoutSec=60, envs={"A": "1"})
    address = str(made["hostIp"])
    version = {"envdVersion": agent.fakes.guests.envd_version}
    phases = {each["name"]: int(each["durationUs"]) for each in made.pop("phases")}
    assert phases["slot"] > 0 and phases["boot"] > 0
    assert made == {"sandboxId": "sb1", "status": "running", "hostIp": address} | version
    assert agent.fakes.guests.identities[address].envs == {"A": "1"}
    (info,) = (await agent.call("ListSandboxes"))["sandboxes"]
    created, active = int(info.pop("createdAtUnix")), int(info.pop("lastActiveAtUnix"))
    assert 1_700_000_000 < created <= active
    assert (
        info
        == {
            "sandboxId": "sb1",
            "status": "running",
            "template": "base",
            "vcpus": 1,
            "memoryMb": 128,
            "diskSizeMb": IMAGE_MB,
            "timeoutSec": 60,
            "hostIp": address,
        }
        | version
    )
    assert await agent.call("PingSandbox", sandboxId="sb1") == {}
    assert await agent.call("DestroySandbox", sandboxId="sb1") == {}
    assert await agent.call("DestroySandbox", sandboxId="sb1") == {}
    assert await agent.call("ListSandboxes") == {}


async def test_sleep_fork_and_templates(agent: Agent) -> None:
    await agent.create(timeoutSec=60)
    at = {"sandboxId": "sb1"}
    paused = await agent.call("PauseSandbox", **at)
    assert {"freeze", "write", "end"} <= {each["name"] for each in paused["phases"]}
    assert [each["status"] for each in await agent.listed()] == ["paused"]
    with pytest.raises(errors.Conflict, match="sb1 is paused"):
        await agent.call("Exec", **at, cmd="x")
    woken = await agent.call("ResumeSandbox", **at, keepTimeout=True)
    assert (woken["status"], [each["timeoutSec"] for each in await agent.listed()]) == (
        "running",
        [60],
    )
    answer = await agent.call("ForkSandbox", **at, childIds=["sb2", "sb1"])
    made, refused = answer["children"]
    assert (made["sandboxId"], refused["sandboxId"]) == ("sb2", "sb1")
    assert "sb1 exists already" in json.dumps(refused)
    made = (await agent.call("CreateCheckpoint", **at, comment="one"))["checkpoint"]
    (listed,) = (await agent.call("ListCheckpoints", **at))["checkpoints"]
    assert (listed, listed["comment"]) == (made, "one")
    checkpoint = {"checkpointId": listed["checkpointId"]}
    assert (await agent.call("RollbackSandbox", **at, **checkpoint))["status"] == "running"
    assert await agent.call("DeleteCheckpoint", **at, **checkpoint) == {}
    await agent.call("CreateSnapshot", **at, name="frozen", live=True)
    templates = (await agent.call("ListTemplates"))["templates"]
    assert {each["name"]: each["kind"] for each in templates} == {
        "base": "image",
        "frozen": "snapshot",
    }
    await agent.create("sb3", template="frozen")
    for each in ("sb1", "sb3"):
        with pytest.raises(errors.Conflict, match=each):
            await agent.call("DeleteSnapshot", name="frozen")
        await agent.call("DestroySandbox", sandboxId=each)
    await agent.call("DeleteSnapshot", name="frozen")


async def test_idle_sandbox_is_told_of_once(agent: Agent) -> None:
    await agent.create(timeoutSec=1)
    told: list[str] = []
    async with asyncio.timeout(DEADLINE_S):
        while not told:
            told = (await agent.call("ListSandboxes")).get("autoPausedSandboxIds", [])
    assert told == ["sb1"]
    assert "autoPausedSandboxIds" not in await agent.call("ListSandboxes")


async def test_metrics(agent: Agent) -> None:
    await agent.create()
    at = {"sandboxId": "sb1"}
    points: list[Any] = []
    async with asyncio.timeout(DEADLINE_S):
        while not points:
            points = (await agent.call("GetSandboxMetrics", **at, range="10m")).get("points", [])
    assert points[0]["timestampUnix"]
    with pytest.raises(errors.Invalid, match="no range"):
        await agent.call("GetSandboxMetrics", **at, range="1y")
    assert "points10m" in await agent.call("FlushSandboxMetrics", **at)


async def test_exec(agent: Agent) -> None:
    async def seven(command: Command) -> AsyncGenerator[ProcessEvent, None]:
        yield Started(42)
        yield Output(b"\xff\0out")
        yield Output(b"err", stdout=False)
        yield Ended(exit_code=137, signal=9, error="killed", timed_out=command.timeout_s == 5)

    agent.fakes.guests.running = seven
    await agent.create()
    answer = await agent.call("Exec", sandboxId="sb1", cmd="x")
    out, err = encoded(b"\xff\0out"), encoded(b"err")
    assert answer == {"stdout": out, "stderr": err, "exitCode": 137}
    assert await agent.stream("ExecStream", {"sandboxId": "sb1", "cmd": "x"}) == [
        {"start": {"pid": 42}},
        {"data": {"stdout": out}},
        {"data": {"stderr": err}},
        {"end": {"exitCode": 137, "signal": 9, "error": "killed"}},
    ]
    with pytest.raises(errors.TimedOut, match="within 5 s and was killed") as caught:
        await agent.call("Exec", sandboxId="sb1", cmd="x", timeoutSec=5)
    assert "ExecStream" in caught.value.hint


async def test_files_and_input(agent: Agent) -> None:
    await agent.create()
    at_a = {"sandboxId": "sb1", "path": "/a"}
    await agent.call("WriteFile", **at_a, content=encoded(b"one"))
    assert await agent.call("ReadFile", **at_a) == {"content": encoded(b"one")}
    big = os.urandom(200_000)
    chunks = [{"chunk": encoded(big[at : at + 50_000])} for at in range(0, len(big), 50_000)]
    assert await agent.stream("WriteFileStream", {"meta": at_a}, *chunks) == [{}]
    read = await agent.stream("ReadFileStream", at_a)
    assert len(read) > 1
    assert b"".join(base64.b64decode(each["chunk"]) for each in read) == big
    tar = await agent.stream("ReadTree", {"sandboxId": "sb1", "path": "/a"})
    into = {"meta": {"sandboxId": "sb1", "directory": "/tree"}}
    assert await agent.stream("WriteTree", into, *tar) == [{"members": "1"}]
    assert await agent.call("ReadFile", sandboxId="sb1", path="/tree/a") == await agent.call(
        "ReadFile", **at_a
    )
    for path in ("tree", "", "/tree/../a"):
        with pytest.raises(errors.Invalid):
            await agent.stream("WriteTree", {"meta": {"sandboxId": "sb1", "directory": path}})
        with pytest.raises(errors.Invalid):
            await agent.stream("ReadTree", {"sandboxId": "sb1", "path": path})
    meta = {"sandboxId": "sb1", "pid": 7}
    await agent.stream("StreamInput", {"meta": meta}, {"chunk": encoded(b"in")})
    assert agent.fakes.guests.inputs == {7: b"in<end>"}
    await agent.call("SendSignal", **meta, signal=15)
    assert agent.fakes.guests.signals == [(7, 15)]


async def test_content_too_large_for_one_message(agent: Agent) -> None:
    async def flood(_: Command) -> AsyncGenerator[ProcessEvent, None]:
        while True:
            yield Output(b"x" * 2**20)

    agent.fakes.guests.running = flood
    agent.fakes.guests.files["/big"] = b"x" * (MAX_MESSAGE_BYTES + 1)
    await agent.create()
    for call in (
        agent.call("Exec", sandboxId="sb1", cmd="yes"),
        agent.call("ReadFile", sandboxId="sb1", path="/big"),
    ):
        with pytest.raises(errors.Exhausted, match="is larger than") as caught:
            await call
        assert "streaming" in caught.value.hint


# Errors.


async def test_every_error_arrives_as_itself(agent: Agent) -> None:
    raised: SandmartinError

    async def fail(_: Command) -> AsyncGenerator[ProcessEvent, None]:
        yield Output(b"first")
        raise raised

    agent.fakes.guests.running = fail
    await agent.create()
    for code, kind in errors.BY_CODE.items():
        raised = kind(f"no {code} today", hint=f"try {code}")
        body = json.dumps({"sandboxId": "sb1", "cmd": "x"}).encode()
        response = await agent.post("Exec", body)
        assert response.json()["code"] == CODES[code].value
        for received in (
            error_from_body(response.json(), response.status_code),
            await _error_of_stream(agent),
        ):
            assert type(received) is kind
            assert (received.message, received.hint) == (raised.message, raised.hint)
    assert agent.fakes.guests.checks == 2, "GuestSilent alone asks whether the guest is there"


async def _error_of_stream(agent: Agent) -> SandmartinError:
    with pytest.raises(SandmartinError) as caught:
        await agent.stream("ExecStream", {"sandboxId": "sb1", "cmd": "x"})
    return caught.value


async def test_a_bug_is_logged_once_and_tells_nothing(
    agent: Agent, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_: Command) -> AsyncGenerator[ProcessEvent, None]:
        yield Started(1)
        raise KeyError("hunter2")

    agent.fakes.guests.running = fail
    await agent.create()
    request = {"sandboxId": "sb1", "cmd": "x"}
    for call in (agent.call("Exec", **request), agent.stream("ExecStream", request)):
        caplog.clear()
        with caplog.at_level(logging.WARNING), pytest.raises(SandmartinError) as caught:
            await call
        assert (caught.value.code, caught.value.message) == (
            "internal",
            "internal error; the agent's log says more",
        )
        (record,) = caplog.records
        assert record.exc_info and "hunter2" in str(record.exc_info[1])


async def test_every_method_is_there_and_looks_at_its_request(agent: Agent) -> None:
    answered = {}
    for method in (each.name for each in HostAgentService.desc().methods):
        if method == "Terminate":
            continue
        streams = method in STREAMS_IN | STREAMS_OUT
        call = agent.stream(method, {}) if streams else agent.call(method)
        try:
            answered[method] = str(await call)
        except SandmartinError as error:
            answered[method] = error.code
    templates = answered.pop("ListTemplates")
    assert "base" in templates
    assert "'accel': 'tcg'" in answered.pop("DescribeHost")
    # What names no sandbox is refused; a list is empty, and what is gone already is gone.
    assert set(answered.values()) == {"{}", "invalid", "not_found"}
    assert {name for name, code in answered.items() if code == "{}"} == {
        "ListSandboxes",
        "DestroySandbox",
    }


async def test_requests_that_can_never_work(agent: Agent) -> None:
    await agent.create()
    for path in ("", "..", "/a/../b", "/a\0b"):
        at = {"sandboxId": "sb1", "path": path}
        for call in (
            agent.call("WriteFile", **at, content=""),
            agent.call("ReadFile", **at),
            agent.stream("WriteFileStream", {"meta": at}),
            agent.stream("ReadFileStream", at),
        ):
            with pytest.raises(errors.Invalid, match="path"):
                await call
    for message in ({"chunk": ""}, {}):
        for method in STREAMS_IN:
            with pytest.raises(errors.Invalid, match="must carry meta data"):
                await agent.stream(method, message)
    meta = {"meta": {"sandboxId": "sb1", "path": "/a"}}
    with pytest.raises(errors.Invalid, match="only the first message"):
        await agent.stream("WriteFileStream", meta, meta)
    assert "/a" not in agent.fakes.guests.files
    for number in (0, 65, -1):
        with pytest.raises(errors.Invalid, match="signal"):
            await agent.call("SendSignal", sandboxId="sb1", pid=7, signal=number)
    with pytest.raises(errors.AlreadyExists):
        await agent.create()
    for fields in ({"template": "x/y"}, {"vcpus": -1}, {"memoryMb": 1}):
        with pytest.raises(errors.Invalid):
            await agent.create("sb2", **fields)
    for method in ("Exec", "PingSandbox"):
        with pytest.raises(errors.NotFound):
            await agent.call(method, sandboxId="../sb1", cmd="x")
    assert agent.fakes.guests.signals == []


#: Method, content type, content, and the code of the answer.
MALFORMED = [
    ("Exec", "application/json", b"{", "invalid_argument"),
    ("Exec", "application/json", b'{"cmd": 7}', "invalid_argument"),
    ("Exec", "application/json", b"[" * 50_000, "invalid_argument"),
    ("Exec", "application/json", b'{"cmd": "\xff"}', "invalid_argument"),
    ("Exec", "application/proto", b"\xff\xff", "invalid_argument"),
    ("Exec", "application/json", b" " * (MAX_MESSAGE_BYTES + 1), "resource_exhausted"),
    ("ExecStream", "application/connect+json", b"", "unimplemented"),
    ("ExecStream", "application/connect+json", b"\0\0", "invalid_argument"),
    ("ExecStream", "application/connect+json", frame(b"{}", 0x80), "invalid_argument"),
    ("ExecStream", "application/connect+json", frame(b"{}") * 2, "unimplemented"),
    ("ExecStream", "application/connect+json", b"\0\0\0\0\x09{}", "invalid_argument"),
    ("ExecStream", "application/connect+json", b"\0\xff\xff\xff\xff", "resource_exhausted"),
    ("WriteFileStream", "application/connect+json", frame(b"{"), "invalid_argument"),
    ("StreamInput", "application/connect+json", b"\0\xff\xff\xff\xff", "resource_exhausted"),
]


async def test_malformed_messages(agent: Agent) -> None:
    for method, content_type, content, code in MALFORMED:
        response = await agent.post(method, content, content_type)
        what = f"{method} with {content[:20]!r}"
        if content_type.startswith("application/connect"):
            ((flags, end),) = list(frames(response.content))
            assert (flags, end["error"]["code"]) == (2, code), what
        else:
            assert response.json()["code"] == code, what
            assert 400 <= response.status_code < 500, what
        assert await agent.call("ListSandboxes") == {}, what


async def test_message_that_is_large_once_unpacked(agent: Agent) -> None:
    bomb = gzip.compress(b" " * (MAX_MESSAGE_BYTES + 1))
    response = await agent.post("Exec", bomb, **{"content-encoding": "gzip"})
    assert response.json()["code"] == "resource_exhausted"


async def test_what_is_no_call_of_ours(agent: Agent) -> None:
    assert (await agent.post("Exec", b"{}", "text/plain")).status_code == 415
    assert (await agent.post("Nothing", b"{}")).status_code == 404
    assert (await agent.http.get(f"/{SERVICE}/Terminate?encoding=json&message={{}}")).is_error
    reader, writer = await asyncio.open_unix_connection(agent.socket)
    writer.write(b"\0\1\2 not HTTP\r\n\r\n")
    assert b"400" in await asyncio.wait_for(reader.readline(), DEADLINE_S)
    writer.close()
    await writer.wait_closed()
    assert await agent.call("ListSandboxes") == {}


# Slow and vanished callers.


async def test_slow_reader_holds_its_producer(agent: Agent) -> None:
    chunk, total = b"x" * 2**16, 1024
    sent = 0

    async def flood(_: Command) -> AsyncGenerator[ProcessEvent, None]:
        nonlocal sent
        while sent < total:
            sent += 1
            yield Output(chunk)
        yield Ended(exit_code=0)

    agent.fakes.guests.running = flood
    await agent.create()
    body = json.dumps({"sandboxId": "sb1", "cmd": "yes"}).encode()
    async with agent.http.stream(
        "POST",
        f"/{SERVICE}/ExecStream",
        content=frame(body),
        headers={"content-type": "application/connect+json"},
    ) as response:
        history: list[int] = []

        def stands_still() -> bool:
            history.append(sent)
            return sent > 0 and history[-50:] == [sent] * 50

        await until(stands_still, "the producer to be held")
        assert sent * len(chunk) < 4 * 2**20
        received = b"".join([piece async for piece in response.aiter_raw()])
    assert sum(1 for _ in frames(received)) == total + 2
    assert sent == total


async def _endless(*messages: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    for message in messages:
        yield frame(json.dumps(message).encode())
    while True:
        yield frame(json.dumps({"chunk": encoded(bytes(2**16))}).encode())
        await asyncio.sleep(0)


async def test_refusal_is_heard_by_who_goes_on_sending(agent: Agent) -> None:
    await agent.create()
    at = {"sandboxId": "sb1", "path": "/a"}
    whole = frame(json.dumps({"meta": at}).encode())
    kept = await agent.post("WriteFileStream", whole, "application/connect+json")
    assert "connection" not in kept.headers
    for refused, kind in (
        ([{"meta": at}, {"meta": at}], errors.Invalid),
        ([{"meta": at | {"sandboxId": "sbnone"}}], errors.NotFound),
    ):
        for send in (_send_by_httpx, _send_and_listen):
            async with asyncio.timeout(DEADLINE_S):
                status, content = await send(agent, _endless(*refused))
            ((flags, end),) = list(frames(content))
            assert (status, flags) == (200, 2)
            assert isinstance(error_from_body(end["error"]), kind)
    assert len(await agent.listed()) == 1


async def _send_by_httpx(agent: Agent, body: AsyncGenerator[bytes, None]) -> tuple[int, bytes]:
    """As a client that looks for the answer once it cannot send any more."""
    async with contextlib.aclosing(body):
        headers = {"content-type": "application/connect+json"}
        url = f"/{SERVICE}/WriteFileStream"
        response = await agent.http.post(url, content=body, headers=headers)
    assert response.headers["connection"] == "close"
    return response.status_code, response.content


async def _send_and_listen(agent: Agent, body: AsyncGenerator[bytes, None]) -> tuple[int, bytes]:
    """As a client that listens all the time."""
    connection = h11.Connection(h11.CLIENT)
    reader, writer = await asyncio.open_unix_connection(agent.socket)
    request = h11.Request(
        method="POST",
        target=f"/{SERVICE}/WriteFileStream",
        headers=[
            ("host", "agent"),
            ("content-type", "application/connect+json"),
            ("transfer-encoding", "chunked"),
        ],
    )

    async def send() -> None:
        writer.write(connection.send(request) or b"")
        async with contextlib.aclosing(body):
            async for piece in body:
                writer.write(connection.send(h11.Data(data=piece)) or b"")
                await writer.drain()

    sending = asyncio.create_task(send())
    answer = h11.Connection(h11.CLIENT)
    answer.send(h11.Request(method="GET", target="/", headers=[("host", "agent")]))
    answer.send(h11.EndOfMessage())
    status, content = 0, b""
    while not isinstance(event := answer.next_event(), h11.EndOfMessage):
        if event is h11.NEED_DATA:
            answer.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            content += event.data
    # And it is ended, by no act of its own.
    with pytest.raises(OSError):
        await sending
    writer.close()
    return status, content


async def test_listener_that_hangs_up(agent: Agent) -> None:
    closed = asyncio.Event()

    async def endless(_: Command) -> AsyncGenerator[ProcessEvent, None]:
        try:
            yield Started(1)
            await asyncio.Event().wait()
        finally:
            closed.set()

    agent.fakes.guests.running = endless
    await agent.create()
    body = frame(json.dumps({"sandboxId": "sb1", "cmd": "x"}).encode())
    headers = {"content-type": "application/connect+json"}
    url = f"/{SERVICE}/ExecStream"
    async with agent.http.stream("POST", url, content=body, headers=headers) as response:
        async for _ in response.aiter_raw():
            break
    await asyncio.wait_for(closed.wait(), DEADLINE_S)
    (info,) = (await agent.call("ListSandboxes"))["sandboxes"]
    assert info["status"] == "running"


async def test_terminate_outlives_its_caller(directory: Path) -> None:
    async with agent_on(make_machine(directory)) as agent:
        await agent.create()
        reader, writer = await asyncio.open_unix_connection(agent.socket)
        request = f"POST /{SERVICE}/Terminate HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n"
        writer.write(request.encode() + b"content-type: application/json\r\n\r\n{}")
        await writer.drain()
        # It has been heard once the first sandbox is on its way out.
        await until(lambda: not find_vms(directory), "the VM's end")
        writer.close()
        await writer.wait_closed()
        del reader
        async with asyncio.timeout(DEADLINE_S):
            await agent.serving
    assert not find_leaks(directory)


# Beginning and end of the agent.


async def test_signal_leaves_the_sandboxes(directory: Path) -> None:
    async with agent_on(make_machine(directory)) as agent:
        await agent.create()
        await agent.create("sb2")
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            await agent.serving
        assert not agent.socket.exists()
    assert len(find_vms(directory)) == 2
    async with agent_on(make_machine(directory)) as agent:
        vm = agent.fakes.vmm.vms["sb2"]
        vm.condition, vm.has_space = VmStatus.DISK_FULL, False
        infos = {}

        async def full() -> bool:
            answer = await agent.call("ListSandboxes")
            infos.update({info["sandboxId"]: info for info in answer["sandboxes"]})
            return "statusReason" in infos["sb2"]

        async with asyncio.timeout(DEADLINE_S):
            while not await full():
                pass
        assert [infos[each]["status"] for each in ("sb1", "sb2")] == ["running"] * 2
        assert "disk is full" in infos["sb2"]["statusReason"]
        assert "statusReason" not in infos["sb1"]
    assert not find_leaks(directory)


async def test_end_of_stdin_ends_all(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = make_machine(directory)
    reading, writing = os.pipe()
    with os.fdopen(reading) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(
            serve_machine(fakes.machine, until_stdin_closes=True, announce=ready.set_result)
        )
        await asyncio.wait_for(ready, DEADLINE_S)
        transport = httpx.AsyncHTTPTransport(uds=os.fspath(fakes.machine.settings.socket))
        async with httpx.AsyncClient(transport=transport, base_url="http://agent") as http:
            made = await http.post(f"/{SERVICE}/CreateSandbox", json=SMALL)
        assert made.status_code == 200
        os.write(writing, b"ignored")
        os.close(writing)
        async with asyncio.timeout(DEADLINE_S):
            await serving
    fakes.machine.data.close()
    assert not find_leaks(directory)


async def test_a_watch_that_dies_ends_the_agent(directory: Path) -> None:
    async def die() -> None:
        raise RuntimeError("a bug of ours")

    fakes = make_machine(directory)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        async with agent_on(fakes) as agent:
            await agent.create()
            fakes.machine.tasks.watch("test", die())
            await asyncio.wait({agent.serving}, timeout=DEADLINE_S)
    fakes.machine.data.close()
    assert len(find_vms(directory)) == 1
    assert not fakes.machine.settings.socket.exists()


async def test_socket_path_that_is_too_long(directory: Path) -> None:
    fakes = make_machine(directory, data_dir=directory / ("x" * 120))
    (directory / ("x" * 120)).mkdir()
    with pytest.raises(errors.Invalid, match="cannot be made") as caught:
        await serve_machine(fakes.machine)
    assert "--data-dir" in caught.value.hint
    fakes.machine.data.close()


# Who may use the socket.

#: The interpreter itself may be out of another user's reach, so it becomes one once it runs.
_CONNECT = """
import os, socket, sys
path, user, group = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.setgroups([])
os.setgid(group)
os.setuid(user)
socket.socket(socket.AF_UNIX).connect(path)
"""


async def _connects(path: Path, *, user: int, group: int) -> bool:
    """Whether a process of another user can connect; any other failure is a failed test."""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-IS", "-c", _CONNECT, os.fspath(path), str(user), str(group)],
        stderr=subprocess.PIPE,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0 or b"PermissionError" in done.stderr
    return done.returncode == 0


async def test_socket_is_its_owners_alone(directory: Path) -> None:
    # Whatever the umask is.
    before = os.umask(0)
    try:
        async with agent_on(make_machine(directory, group="no-such-group")) as agent:
            assert stat.S_IMODE(agent.socket.stat().st_mode) == 0o600
            if os.geteuid() == 0:
                assert not await _connects(agent.socket, user=65534, group=0)
    finally:
        os.umask(before)


@pytest.mark.root
async def test_socket_and_its_group(directory: Path) -> None:
    # Debian's group of lists stands for ours: no group is made on the machine for this.
    async with agent_on(make_machine(directory, group="list")) as agent:
        status = agent.socket.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o660, 0)
        assert await _connects(agent.socket, user=65534, group=status.st_gid)
        assert not await _connects(agent.socket, user=65534, group=65534)


async def test_stale_socket_is_replaced(directory: Path) -> None:
    fakes = make_machine(directory)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(os.fspath(fakes.machine.settings.socket))
    async with agent_on(fakes) as agent:
        assert await agent.call("ListSandboxes") == {}
