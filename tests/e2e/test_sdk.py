"""The SDK on real VMs of `sandmartin up`: what the documentation shows, and what it promises."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandmartin import AsyncSandbox, CommandFailed, CommandTimedOut, Sandbox, Stdout
from sandmartin.errors import Conflict, NotFound, TimedOut
from tests.e2e.conftest import Place
from tests.e2e.test_up import Up, clear, up

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0
_EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_IMPORT = "from sandmartin import Sandbox\n"


@pytest.fixture
def served(place: Place) -> Iterator[Up]:
    with up(place, "data") as served:
        yield served
        served.end()
    clear(place, "data")


async def life(at: dict[str, Any], directory: Path) -> None:
    async with await AsyncSandbox.create(memory_mb=256, timeout=600, **at) as sandbox:
        assert (await sandbox.info()).state == "running"
        await commands(sandbox)
        await folders(sandbox, directory)
        await git(sandbox)
        await copies(sandbox)
        await ports(sandbox)
    with pytest.raises((Conflict, NotFound)):
        await sandbox.commands.run("true")
    assert [each async for each in AsyncSandbox.list(states=["running"], **at)] == []


async def commands(sandbox: AsyncSandbox) -> None:
    result = await sandbox.commands.run("whoami; [[ a == a ]] && pwd", user="user")
    assert result.stdout == "user\n/home/user\n"
    with pytest.raises(CommandFailed) as failed:
        await sandbox.commands.run("exit 7")
    assert failed.value.exit_code == 7
    with pytest.raises(CommandTimedOut):
        await sandbox.commands.run("sleep 100", timeout=1)
    handle = await sandbox.commands.run("cat", background=True, stdin=True)
    await handle.send_stdin("one\n")
    async with asyncio.timeout(DEADLINE_S):
        assert await anext(aiter(handle)) == Stdout(b"one\n")
    await handle.close_stdin()
    assert (await handle.wait()).stdout == "one\n"
    said = bytearray()
    terminal = await sandbox.pty.create(91, 17, on_data=said.extend)
    await terminal.send_stdin("stty size\n")
    async with asyncio.timeout(DEADLINE_S):
        while b"17 91" not in said:
            await asyncio.sleep(0.05)
    assert await terminal.kill()


async def folders(sandbox: AsyncSandbox, directory: Path) -> None:
    source, back = directory / "source", directory / "back"
    (source / "bin").mkdir(parents=True)
    (source / "bin" / "run").write_text("#!/bin/sh\necho ran\n")
    (source / "bin" / "run").chmod(0o755)
    (source / "link").symlink_to("bin/run")
    (source / "large").write_bytes(os.urandom(5 << 20))
    for number in range(30):
        (source / f"small-{number}").write_text(str(number))
    await sandbox.files.upload(source, "/root/tree")
    assert (await sandbox.commands.run("/root/tree/link")).stdout == "ran\n"
    await sandbox.commands.run("ln -s /etc/passwd out; mkfifo pipe", cwd="/root/tree")
    copied = await sandbox.files.download("/root/tree", back)
    assert copied.left_out == ("out", "pipe")
    same = subprocess.run(["diff", "-r", "--no-dereference", source, back], check=False)
    assert same.returncode == 0
    assert (back / "bin" / "run").stat().st_mode & 0o777 == 0o755
    assert os.readlink(back / "link") == "bin/run"  # noqa: PTH115 the text itself
    async with await sandbox.files.watch("/root/tree", recursive=True) as watch:
        await sandbox.files.write("/root/tree/bin/new", "1")
        async with asyncio.timeout(DEADLINE_S):
            assert (await anext(aiter(watch))).name == "bin/new"


async def git(sandbox: AsyncSandbox) -> None:
    await sandbox.commands.run(["git", "init", "--quiet", "--bare", "-b", "main", "/root/bare"])
    await sandbox.git.clone("/root/bare", "/root/work")
    await sandbox.git.configure_user("A", "a@example.org")
    await sandbox.files.write("/root/work/file", "1")
    await sandbox.git.add("/root/work")
    first = await sandbox.git.commit("/root/work", "One")
    await sandbox.git.push("/root/work", set_upstream=True)
    await sandbox.git.clone("/root/bare", "/root/other")
    head = await sandbox.commands.run(["git", "rev-parse", "HEAD"], cwd="/root/other")
    assert head.stdout.strip() == first
    status = await sandbox.git.status("/root/work")
    assert (status.branch, status.upstream, status.is_clean) == ("main", "origin/main", True)


async def copies(sandbox: AsyncSandbox) -> None:
    await sandbox.files.write("/dev/shm/n", "1")
    kept = await sandbox.checkpoint("one")
    children = await sandbox.fork(2)
    await sandbox.files.write("/dev/shm/n", "2")
    for child in children:
        assert await child.files.read("/dev/shm/n") == "1"
        await child.kill()
    await sandbox.rollback(kept)
    assert await sandbox.files.read("/dev/shm/n") == "1"
    await sandbox.pause()
    assert (await sandbox.info()).state == "paused"
    await sandbox.resume()
    assert await sandbox.files.read("/dev/shm/n") == "1"


async def ports(sandbox: AsyncSandbox) -> None:
    serve = ["python3", "-m", "http.server", "8000", "--directory", "/root/tree"]
    server = await sandbox.commands.run(serve, background=True, timeout=None)
    host = await sandbox.get_host(8000)
    curl = ["curl", "-sSf", "--retry", "20", "--retry-all-errors", "--retry-delay", "1"]
    curl += ["--resolve", f"{host}:127.0.0.1", f"{await sandbox.url(8000)}/small-7"]
    done = await asyncio.to_thread(subprocess.run, curl, capture_output=True, timeout=60)
    assert done.stdout == b"7", done
    assert await server.kill()


@pytest.mark.timeout(300)
@pytest.mark.full
async def test_what_is_promised_and_what_is_shown(served: Up, tmp_path: Path) -> None:
    await life({"url": served.url, "api_key": served.key}, tmp_path)
    await asyncio.to_thread(show, served, tmp_path)


def show(served: Up, tmp_path: Path) -> None:
    """Run what the documentation shows."""
    examples = _EXAMPLE.findall((ROOT / "docs" / "sdk.md").read_text())
    assert len(examples) >= 8
    environment = os.environ | {"SANDMARTIN_URL": served.url, "SANDMARTIN_API_KEY": served.key}
    for number, example in enumerate(examples):
        directory = tmp_path / str(number)
        directory.mkdir()
        script = example if "import" in example else _IMPORT + example
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            cwd=directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), (example, served.log.read_text()[-2000:])
    assert served.ask("GET", "/sandboxes")["items"] == []


PLOT = """
import matplotlib.pyplot as plt
plt.bar(["a", "b"], [1, 2])
plt.title("grains")
plt.show()
"""


@pytest.mark.template("code-interpreter-v1")
@pytest.mark.timeout(300)
def test_code_by_the_blocking_interface(served: Up) -> None:
    at: dict[str, Any] = {"url": served.url, "api_key": served.key}
    heard: list[str] = []
    with Sandbox.create("code-interpreter-v1", **at) as sandbox:
        sandbox.run_code("x = 20")
        found = sandbox.run_code(
            "print('said')\nx + 1", on_stdout=lambda output: heard.append(output.text)
        )
        assert (found.text, found.error, found.stdout) == ("21", None, "said\n")
        assert "".join(heard) == "said\n"

        (shown,) = sandbox.run_code(PLOT).results
        assert shown.png is not None and shown.chart is not None
        assert base64.b64decode(shown.png).startswith(b"\x89PNG")
        assert (shown.chart["type"], shown.chart["title"]) == ("bar", "grains")

        error = sandbox.run_code("1 / 0").error
        assert error is not None
        assert error.name == "ZeroDivisionError"
        assert "1 / 0" in error.traceback

        with pytest.raises(TimedOut):
            sandbox.run_code("while True: pass", timeout=1)
        # What went wrong costs no variables.
        assert sandbox.run_code("x").text == "20"
        context = sandbox.create_code_context(language="javascript")
        assert "4" in (sandbox.run_code("[1, 2].map((n) => n * 2)", context=context).text or "")
