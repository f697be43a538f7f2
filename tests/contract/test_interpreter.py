"""The code interpreter's server with real kernels, outside a VM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

SERVER = Path(__file__).resolve().parents[2] / "images/code-interpreter-v1/server"
DEADLINE_S = 60.0
TOKEN = "token-that-nobody-may-see"

pytestmark = pytest.mark.timeout(180)

Item = dict[str, Any]


@dataclass
class GuestAgent:
    """Answers `GET /envs` as a guest agent does, to who knows its token."""

    envs: dict[str, str] = field(default_factory=dict)
    asked: int = 0
    url: str = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        self.asked += 1
        known = head.startswith("get /envs ") and f"x-access-token: {TOKEN}" in head
        body = json.dumps(self.envs).encode() if known else b"no"
        status = "200 OK" if known else "401 Unauthorized"
        writer.write(f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()


@dataclass
class Interpreter:
    """A server that runs, and the sandbox it believes to be in."""

    http: httpx.AsyncClient
    pid: int
    guest: GuestAgent
    machine_id: Path
    home: Path
    said: Path

    @asynccontextmanager
    async def execution(self, code: str, **more: object) -> AsyncIterator[AsyncIterator[Item]]:
        """What code gives, as it comes."""
        headers = {"X-Access-Token": TOKEN}
        body = {"code": code, **more}
        async with self.http.stream("POST", "/execute", json=body, headers=headers) as response:
            assert response.status_code == 200, await response.aread()
            yield (json.loads(line) async for line in response.aiter_lines())

    async def run(self, code: str, **more: object) -> list[Item]:
        async with self.execution(code, **more) as items:
            found = [item async for item in items]
        assert found.pop() == {"type": "end_of_execution"}
        return [item for item in found if item["type"] != "keepalive"]

    async def value(self, code: str, **more: object) -> str:
        """The text of the only result."""
        (found,) = (i for i in await self.run(code, **more) if i["type"] == "result")
        return str(found["text"])

    async def refused(self, **body: object) -> tuple[int, str]:
        response = await self.http.post("/execute", json=body)
        return response.status_code, response.text


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sandmartin-test-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
async def interpreter(place: Path) -> AsyncIterator[Interpreter]:
    """One for all, as in a sandbox: its kernels take long to start."""
    guest = GuestAgent()
    envd = await asyncio.start_server(guest.answer, "127.0.0.1", 0)
    guest.url = f"http://127.0.0.1:{envd.sockets[0].getsockname()[1]}/envs"
    home, machine_id, said = place / "home", place / "machine-id", place / "said"
    home.mkdir()
    machine_id.write_text("0" * 32)
    words = ["--address=127.0.0.1", "--port=0", f"--home={home}", f"--envs-url={guest.url}"]
    env = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": os.fspath(home),
        "PYTHONPATH": os.fspath(SERVER),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with said.open("wb") as errors:
        server = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "code_interpreter", *words, f"--machine-id={machine_id}"),
            env=env,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
        )
    try:
        assert server.stdout is not None
        line = (await asyncio.wait_for(server.stdout.readline(), DEADLINE_S)).decode()
        assert line.startswith("serving on port "), said.read_text()
        base_url = f"http://127.0.0.1:{line.split()[-1]}"
        async with httpx.AsyncClient(base_url=base_url, timeout=DEADLINE_S) as http:
            yield Interpreter(http, server.pid, guest, machine_id, home, said)
        server.terminate()
        # It ends all that it has started.
        assert await asyncio.wait_for(server.wait(), DEADLINE_S) == 0
        assert not _kernels(place)
    finally:
        if server.returncode is None:
            server.kill()
        envd.close()


def _kernels(place: Path) -> list[str]:
    """Command lines of all that runs in a directory."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if place in (process / "cwd").readlink().parents:
                    found.append((process / "cmdline").read_text())
            except OSError:
                continue
    return found


# It comes first: the others count on.


async def test_begins_as_if_nothing_had_been_run(interpreter: Interpreter) -> None:
    assert (await interpreter.http.get("/health")).status_code == 200
    items = await interpreter.run("print('hi')\n40 + 2")
    timestamp = items[1].pop("timestamp")
    assert isinstance(timestamp, int)
    assert items == [
        {"type": "number_of_executions", "execution_count": 1},
        {"type": "stdout", "text": "hi\n"},
        {"type": "result", "is_main_result": True, "text": "42"},
    ]
    assert (
        await interpreter.value("sorted(n for n in globals() if n in {'pandas', '_1'})") == "['_1']"
    )


async def test_state_stays_and_quotes_go(interpreter: Interpreter) -> None:
    await interpreter.run("word = 'kept'")
    assert await interpreter.value("word") == "kept"


async def test_streams_while_it_runs(interpreter: Interpreter) -> None:
    go_on = interpreter.home / "go-on"
    code = (
        "import pathlib, time, sys\nprint('begun', flush=True)\n"
        f"while not pathlib.Path({str(go_on)!r}).exists(): time.sleep(0.01)\n"
        "print('late', file=sys.stderr)"
    )
    seen = []
    async with interpreter.execution(code) as items:
        async for item in items:
            seen.append((item["type"], item.get("text")))
            # Nothing is told for a while, and so that is.
            if item["type"] == "keepalive":
                go_on.touch()
    assert ("stdout", "begun\n") in seen and ("stderr", "late\n") in seen
    assert seen.index(("stdout", "begun\n")) < seen.index(("keepalive", None))


async def test_error_tells_name_value_and_traceback(interpreter: Interpreter) -> None:
    (_, error) = await interpreter.run("def f():\n    raise KeyError('gone')\nf()")
    assert (error["type"], error["name"], error["value"]) == ("error", "KeyError", "'gone'")
    assert "raise KeyError('gone')" in error["traceback"] and "\x1b" not in error["traceback"]
    (_, error) = await interpreter.run("input()")
    assert error["name"] == "StdinNotImplementedError"


async def test_kinds_of_results(interpreter: Interpreter) -> None:
    content = {
        "text/plain": "t",
        "text/html": "<b>",
        "image/png": "iVBORw==",
        "application/json": {"a": 1},
        "application/x-own": "own",
    }
    items = await interpreter.run(
        f"from IPython.display import display\ndisplay({content}, raw=True)"
    )
    assert items[1:] == [
        {
            "type": "result",
            "is_main_result": False,
            "text": "t",
            "html": "<b>",
            "png": "iVBORw==",
            "json": {"a": 1},
            "extra": {"application/x-own": "own"},
        }
    ]


async def test_who_hangs_up_interrupts(interpreter: Interpreter) -> None:
    code = (
        "import time\nended = 'never'\nprint('begun')\ntry:\n    time.sleep(600)\n"
        "except KeyboardInterrupt:\n    ended = 'early'\n    raise"
    )
    async with interpreter.execution(code, env_vars={"ONCE": "during"}) as items:
        async for item in items:
            if item["type"] == "stdout":
                break
    assert await interpreter.value("ended") == "early"
    assert await interpreter.value("import os; 'ONCE' in os.environ") == "False"


async def test_one_after_the_other(interpreter: Interpreter) -> None:
    code = "import time; seen = globals().get('seen', []); seen.append({0}); time.sleep(0.05)"
    await interpreter.run("seen = []")
    await asyncio.gather(*(interpreter.run(code.format(n)) for n in range(4)))
    assert sorted(json.loads(await interpreter.value("seen"))) == [0, 1, 2, 3]


async def test_what_cannot_be_run_is_refused(interpreter: Interpreter) -> None:
    assert await interpreter.refused(code="1", context_id="gone") == (404, "Context gone not found")
    status, text = await interpreter.refused(code="1", context_id="x", language="python")
    assert (status, "only one of" in text) == (400, True)
    status, text = await interpreter.refused(code="1", language="100% cobol")
    assert status == 400 and text.startswith("language '100% cobol' is not supported")
    for bad in ({"code": 7}, {"code": "\0"}, {"code": "1", "env_vars": {"A=": "b"}}):
        assert (await interpreter.refused(**bad))[0] == 400
    for body in (b"[]", b"{", b"\xff"):
        assert (await interpreter.http.post("/execute", content=body)).status_code == 400
    assert (await interpreter.http.get("/nothing")).status_code == 404


async def test_contexts(interpreter: Interpreter) -> None:
    http = interpreter.http
    (interpreter.home / "sub").mkdir()
    made = (await http.post("/contexts", json={"cwd": "~/sub"})).json()
    assert (made["language"], made["cwd"]) == ("python", str(interpreter.home / "sub"))
    assert made in (await http.get("/contexts")).json()
    assert await interpreter.value("import os; os.getcwd()", context_id=made["id"]) == made["cwd"]
    await interpreter.run("mine = 1", context_id=made["id"])
    restarted = await http.post(f"/contexts/{made['id']}/restart")
    assert restarted.status_code == 204
    (_, error) = await interpreter.run("mine", context_id=made["id"])
    assert error["name"] == "NameError"
    assert (await http.delete(f"/contexts/{made['id']}")).status_code == 204
    for answer in (
        await http.delete(f"/contexts/{made['id']}"),
        await http.post(f"/contexts/{made['id']}/restart"),
    ):
        assert answer.status_code == 404
    for bad in ({"cwd": "/nowhere"}, {"language": "cobol"}, {"cwd": 7}):
        assert (await http.post("/contexts", json=bad)).status_code == 400


async def test_restart_ends_what_runs_for_ever(interpreter: Interpreter) -> None:
    made = (await interpreter.http.post("/contexts", json={})).json()["id"]
    code = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('begun')\n"
    async with interpreter.execution(code + "time.sleep(600)", context_id=made) as items:
        seen = []
        async for item in items:
            seen.append(item)
            if item["type"] == "stdout":
                await interpreter.http.post(f"/contexts/{made}/restart")
    assert [i["name"] for i in seen if i["type"] == "error"] == ["KernelDied"]
    assert await interpreter.value("1", context_id=made) == "1"
    await interpreter.http.delete(f"/contexts/{made}")


_ENVS = "import os; [os.environ.get(n) for n in ('GLOBAL', 'OTHER', 'ONCE')]"


async def test_environment_of_the_sandbox_and_of_one_execution(interpreter: Interpreter) -> None:
    guest = interpreter.guest
    guest.envs = {"GLOBAL": "all", "ONCE": "before"}
    interpreter.machine_id.write_text("1" * 32)
    once = await interpreter.value(_ENVS, env_vars={"ONCE": "during"})
    assert once == "['all', None, 'during']"
    asked = guest.asked
    assert await interpreter.value(_ENVS) == "['all', None, 'before']"
    assert guest.asked == asked
    # A copy of it that has become another sandbox.
    guest.envs = {"OTHER": 'it\'s "new"\n$HOME'}
    interpreter.machine_id.write_text("2" * 32)
    assert await interpreter.value("(os.environ.get('GLOBAL'), os.environ['OTHER'])") == repr(
        (None, guest.envs["OTHER"])
    )
    # What fails takes it back too.
    await interpreter.run("1 / 0", env_vars={"ONCE": "again"})
    assert await interpreter.value("os.environ.get('ONCE') is None") == "True"


async def test_no_environment_is_none(interpreter: Interpreter) -> None:
    response = await interpreter.http.post(
        "/execute", json={"code": "1 + 1"}, headers={"X-Access-Token": "wrong"}
    )
    assert '"text": "2"' in response.text


async def test_another_sandbox_draws_other_numbers(interpreter: Interpreter) -> None:
    await interpreter.run("import random; random.seed(1)")
    # The same one goes on as it would.
    assert await interpreter.value("random.random()") == "0.13436424411240122"
    interpreter.machine_id.write_text("3" * 32)
    assert await interpreter.value("random.random()") != "0.8474337369372327"


async def test_bash(interpreter: Interpreter) -> None:
    interpreter.guest.envs = {"GLOBAL": 'it\'s "é"\n$HOME', "not-a-name": "x"}
    interpreter.machine_id.write_text("4" * 32)
    # Who hangs up while the kernel starts leaves nothing half done.
    hasty = {"code": "true", "language": "bash"}
    with pytest.raises(httpx.ReadTimeout):
        await interpreter.http.post("/execute", json=hasty, timeout=0.2)
    show = 'echo "<$GLOBAL|$ONCE>"'
    for envs, once in (({"ONCE": "a b"}, "a b"), ({}, "")):
        items = await interpreter.run(show, language="bash", env_vars=envs)
        said = "".join(i["text"] for i in items if i["type"] == "stdout").replace("\r", "")
        assert said == f"<{interpreter.guest.envs['GLOBAL']}|{once}>\n"
    await interpreter.run("export ONCE=mine; X=5", language="bash")
    await interpreter.run("true", language="bash", env_vars={"ONCE": "other"})
    items = await interpreter.run("echo $ONCE $X; false", language="bash")
    assert [i["text"] for i in items if i["type"] == "stdout"] == ["mine 5\n"]
    assert (items[-1]["name"], items[-1]["value"]) == ("ExitStatus", "1")


async def test_kernel_that_dies_is_told_and_replaced(interpreter: Interpreter) -> None:
    items = await interpreter.run(f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})")
    assert items[-1]["name"] == "KernelDied"
    (_, error) = await interpreter.run("word")
    assert error["name"] == "NameError"


async def test_secrets_are_in_no_command_line_and_no_log(
    interpreter: Interpreter, place: Path
) -> None:
    secret = "hunter2-hunter2"
    code = "import subprocess; subprocess.run(['sleep', '0'])"
    await interpreter.run(code, env_vars={"SECRET": secret})
    lines = _kernels(place)
    assert lines
    said = interpreter.said.read_text()
    assert secret not in said + "".join(lines) and TOKEN not in said + "".join(lines)
