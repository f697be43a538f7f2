"""The command line over the REST API: every verb, logging in and out, keys, and completion."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from sandmartin.cli import main
from sandmartin.control.tables import BrowserSession
from sandmartin.transport.login import login_file, stored_login
from tests.command_line import DEADLINE_S
from tests.control.conftest import (
    RunningHost,
    client_of,
    make_team,
    served_platform,
)
from tests.control.living import Place
from tests.terminal import Terminal, ended

pytestmark = pytest.mark.one_database

SMALL = ("--memory", "128", "--disk", "8")
PASSWORD = "a sand martin's nest"
#: Those take signals, which only the main thread of a process can.
_WITH_SIGNALS = {"create", "fork", "run"}


async def start(*words: str, stdin: int = subprocess.DEVNULL) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sandmartin", *words),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@dataclass
class Verbs:
    """Verbs for a control plane that the environment names, in a thread of this process."""

    capsys: pytest.CaptureFixture[str]

    async def __call__(self, *words: str) -> tuple[int, str, str]:
        async with asyncio.timeout(DEADLINE_S):
            if words[0] in _WITH_SIGNALS:
                process = await start(*words)
                out, err = await process.communicate()
                return process.returncode or 0, out.decode(), err.decode()
            code = await asyncio.to_thread(main, [*words])
        return code, *self.capsys.readouterr()

    async def json(self, *words: str) -> Any:
        code, out, err = await self(*words, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config"


@pytest.fixture
async def control(
    database_url: str, tmp_path: Path, host: RunningHost
) -> AsyncIterator[tuple[Any, str]]:
    async with served_platform(database_url, tmp_path, host, sign_up="open") as served:
        yield served


@pytest.fixture
async def verbs(
    control: tuple[Any, str],
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Verbs:
    platform, url = control
    _, key = await make_team(platform)
    monkeypatch.setenv("SANDMARTIN_URL", url)
    monkeypatch.setenv("SANDMARTIN_API_KEY", key)
    return Verbs(capsys)


@pytest.fixture
def inside(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Verbs:
    monkeypatch.setenv("SANDMARTIN_URL", place.url)
    monkeypatch.setenv("SANDMARTIN_API_KEY", place.key)
    return Verbs(capsys)


async def test_the_life_of_sandboxes(verbs: Verbs, control: tuple[Any, str]) -> None:
    code, out, err = await verbs("create", *SMALL, "--timeout", "600")
    assert (code, err) == (0, "")
    sandbox_id = out.strip()
    info = await verbs.json("info", sandbox_id)
    assert (info["state"], info["timeout_s"], info["memory_mb"]) == ("running", 600, 128)
    assert [each["sandbox_id"] for each in await verbs.json("ls")] == [sandbox_id]
    assert await verbs.json("pause", sandbox_id) == {"paused": [sandbox_id], "failed": []}
    assert (await verbs.json("info", sandbox_id))["state"] == "paused"
    assert (await verbs("resume", sandbox_id))[:2] == (0, f"{sandbox_id}\n")
    children = [each["sandbox_id"] for each in await verbs.json("fork", sandbox_id, "-n", "2")]
    kept = (await verbs.json("checkpoint", sandbox_id, "--comment", "here"))["checkpoint_id"]
    assert [each["comment"] for each in await verbs.json("checkpoints", sandbox_id)] == ["here"]
    assert (await verbs.json("rollback", sandbox_id, kept))["state"] == "running"
    assert await verbs.json("checkpoints", sandbox_id, "--rm", kept) == []
    assert (await verbs("snapshot", sandbox_id, "mine", "--live"))[:2] == (0, "mine\n")
    names = {each["name"] for each in await verbs.json("template", "ls")}
    assert names == {"base", "mine"}
    assert isinstance(await verbs.json("metrics", sandbox_id), list)
    named = await verbs.json("url", sandbox_id, "3000")
    port = control[1].rpartition(":")[2]
    assert named["url"] == f"http://3000-{sandbox_id}.localhost:{port}"
    ids = [sandbox_id, *children]
    assert await verbs.json("kill", *ids, "sbgone") == {"killed": [*ids, "sbgone"], "failed": []}
    assert await verbs.json("template", "rm", "mine") == {"removed": ["mine"], "failed": []}
    assert await verbs.json("ls") == []


async def test_what_fails_is_told_with_its_hint(
    verbs: Verbs, control: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = await verbs("create", "-t", "none")
    assert (code, out) == (1, "")
    assert err.startswith("sandmartin: there is no template 'none'")
    assert await verbs("info", "sbgone") == (1, "", "sandmartin: there is no sandbox 'sbgone'\n")
    code, out, err = await verbs("url", "sbgone", "80")
    assert (code, out) == (1, "") and "there is no sandbox" in err
    code, _, err = await verbs("run", "-t", "none", "--", "true")
    assert code == 125 and "there is no template" in err and "note:" not in err
    code, _, err = await verbs("key", "create", "mine")
    assert code == 1 and "sandmartin: " in err
    code, out, err = await verbs("host", "ls")
    assert (code, out) == (1, "") and "sandmartin: " in err
    monkeypatch.setenv("SANDMARTIN_API_KEY", "e2b_" + "0" * 40)
    code, out, err = await verbs("ls")
    assert (code, out) == (1, "") and "the API key is not known" in err and "e2b_" not in err


@pytest.fixture
async def account(control: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Somebody with a password and two teams, who administers the platform."""
    platform, url = control
    async with client_of(platform) as http:
        body = {"email": "ann@example.org", "password": PASSWORD, "name": "Ann"}
        answer = await http.post("/v1/auth/signup", json=body)
        assert answer.status_code == 201, answer.text
        http.headers["x-csrf-token"] = answer.json()["csrf_token"]
        assert (await http.post("/v1/teams", json={"name": "swifts"})).status_code == 201
    return url


async def test_logging_in_with_a_password(
    account: str, config: Path, capsys: pytest.CaptureFixture[str], control: tuple[Any, str]
) -> None:
    verbs = Verbs(capsys)
    terminal = Terminal(XDG_CONFIG_HOME=str(config))
    try:
        child = await terminal.start("login", "--team", "swifts", "--admin")
        await terminal.shows("URL of the control plane: ")
        terminal.type(f"{account}\n")
        await terminal.shows("API key")
        terminal.type("\n")
        await terminal.shows("E-mail address: ")
        terminal.type("ann@example.org\n")
        await terminal.shows("Password: ")
        terminal.type(f"{PASSWORD}\n")
        await terminal.shows(f"logged in to {account}")
        assert await ended(child) == 0 and terminal.is_as_before
        assert PASSWORD.encode() not in terminal.all_shown
    finally:
        terminal.close()
    stored = stored_login(login_file())
    assert stored is not None and stored.url == account and stored.key_id
    # The key is of that team, and administers the platform.
    (key,) = [each for each in await verbs.json("key", "ls") if each["id"] == stored.key_id]
    assert key["admin"] and key["name"].startswith("sandmartin login on ")
    assert [each["name"] for each in await verbs.json("host", "ls")] == ["one"]
    made = await verbs.json("key", "create", "for a robot")
    assert made["key"].startswith("e2b_") and not made["admin"]
    assert await verbs.json("key", "rm", made["id"]) == {"removed": [made["id"]], "failed": []}
    code, out, err = await verbs("key", "create", "second")
    assert code == 0 and out.startswith("e2b_") and "this once" in err
    # Nothing of the session that made the key is left.
    platform, _ = control
    async with platform.db.read() as session:
        count = await session.scalar(select(func.count()).select_from(BrowserSession))
    assert count == 1  # that of `account`
    code, _, err = await verbs("logout")
    assert code == 0 and "note:" not in err
    assert stored_login(login_file()) is None
    async with client_of(platform, **{"x-api-key": stored.api_key}) as http:
        assert (await http.get("/v1/sandboxes")).status_code == 401
    code, _, err = await verbs("logout")
    assert code == 0 and "not logged in" in err


async def test_logging_in_with_a_key(
    control: tuple[Any, str],
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    platform, url = control
    verbs = Verbs(capsys)
    _, key = await make_team(platform)
    code, _, err = await verbs("login", url)
    assert code == 1 and "hint: sandmartin login URL --key-stdin" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("e2b_wrong\n"))
    code, _, err = await verbs("login", url, "--key-stdin")
    assert code == 1 and "not known" in err and "e2b_wrong" not in err
    assert stored_login(login_file()) is None
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{key}\n"))
    told = await verbs.json("login", f"{url}/", "--key-stdin")
    assert told == {"url": url, "file": str(config / "sandmartin" / "login.json")}
    assert await verbs.json("ls") == []
    # A key that others made outlives the logging out.
    assert await verbs.json("logout") == {"url": url}
    async with client_of(platform, **{"x-api-key": key}) as http:
        assert (await http.get("/v1/sandboxes")).status_code == 200


async def test_a_key_may_end_itself_and_no_other(control: tuple[Any, str]) -> None:
    platform, _ = control
    _, key = await make_team(platform)
    _, other = await make_team(platform, "swallows")
    async with client_of(platform, **{"x-api-key": key}) as http:
        caller = await platform.keys.caller(key)
        theirs = await platform.keys.caller(other)
        assert (await http.delete(f"/v1/api-keys/{theirs.actor_id}")).status_code in {403, 404}
        assert (await http.delete(f"/v1/api-keys/{caller.actor_id}")).status_code == 204
        assert (await http.get("/v1/sandboxes")).status_code == 401


# Inside, with a real guest.


@pytest.mark.root
async def test_a_command_has_our_streams(inside: Verbs, place: Place) -> None:
    script = "tr a-z A-Z; echo over >&2; exit 7"
    process = await start("exec", place.sandbox_id, "--", "sh", "-c", script, stdin=subprocess.PIPE)
    async with asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate(b"hello\n" * 50_000)
    assert (process.returncode, out, err) == (7, b"HELLO\n" * 50_000, b"over\n")
    assert await inside.json("ps", place.sandbox_id) == []


@pytest.mark.root
async def test_a_shell_on_a_terminal(inside: Verbs, place: Place) -> None:
    terminal = Terminal(PS1="$ ")
    try:
        child = await terminal.start("shell", place.sandbox_id)
        terminal.type("stty size\n")
        await terminal.shows("40 100")
        terminal.resize(120, 30)
        terminal.type(
            "while [ \"$(stty size)\" != '30 120' ]; do sleep 0.02; done; echo re''sized\n"
        )
        await terminal.shows("resized")
        terminal.type("exit 7\n")
        assert await ended(child) == 7 and terminal.is_as_before
    finally:
        terminal.close()


@pytest.mark.root
async def test_trees_go_both_ways(inside: Verbs, place: Place, tmp_path: Path) -> None:
    source = tmp_path / "tree"
    (source / "deep" / "empty").mkdir(parents=True)
    (source / "deep" / "ü.bin").write_bytes(os.urandom(300_000))
    (source / "top").write_text("x")
    remote = f"{place.sandbox_id}:{tmp_path}/there"
    assert (await inside.json("cp", "-r", str(source), remote))["files"] == 2
    assert (await inside.json("cp", "-r", remote, str(tmp_path / "back")))["bytes"] == 300_001
    for name in ("top", "deep/ü.bin"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert (tmp_path / "back" / "deep" / "empty").is_dir()


@pytest.mark.root
async def test_the_console_is_followed_to_its_end(inside: Verbs, place: Place) -> None:
    made = await place.http.post("/v1/sandboxes", json={"memory_mb": 128, "disk_size_mb": 8})
    sandbox_id = made.json()["id"]
    vm = place.host.fakes.vmm.vms[sandbox_id]
    vm.console = b"booted\r\n"
    process = await start("logs", "-f", sandbox_id)
    assert process.stdout is not None
    async with asyncio.timeout(DEADLINE_S):
        assert await process.stdout.readline() == b"booted\r\n"
        vm.console = "ü later\r\n".encode()
        assert await process.stdout.readline() == "ü later\r\n".encode()
        await place.http.delete(f"/v1/sandboxes/{sandbox_id}")
        _, err = await process.communicate()
    assert process.returncode == 0 and err.startswith(b"the end: ")


@pytest.mark.root
async def test_words_are_completed(inside: Verbs, place: Place, tmp_path: Path) -> None:
    code, script, err = await inside("completion", "bash")
    assert (code, err) == (0, "")
    (tmp_path / "completion.sh").write_text(script)
    (tmp_path / "sandmartin").write_text(f'#!/bin/sh\nexec {sys.executable} -m sandmartin "$@"\n')
    (tmp_path / "sandmartin").chmod(0o755)

    async def completed(line: str) -> list[str]:
        ask = f"""
            source {tmp_path}/completion.sh
            COMP_LINE={line!r}; COMP_POINT={len(line)}; COMP_TYPE=9; COMP_WORDS=({line})
            _python_argcomplete sandmartin
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", ask),
            stdout=subprocess.PIPE,
            env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        )
        async with asyncio.timeout(DEADLINE_S):
            out, _ = await process.communicate()
        return out.decode().split()

    assert await completed("sandmartin chec") == ["checkpoint", "checkpoints"]
    assert await completed("sandmartin metrics --ran") == ["--range"]
    assert place.sandbox_id in await completed("sandmartin exec sb")
    for shell in ("zsh", "fish"):
        code, script, _ = await inside("completion", shell)
        assert code == 0 and "sandmartin" in script


@pytest.mark.root
async def test_run_uses_the_control_plane(inside: Verbs, place: Place, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_text("n\n")
    upload = ("--file", f"{data}:{tmp_path}/up")
    command = ("cat", f"{tmp_path}/up", "-")
    process = await start("run", *SMALL, "-v", *upload, "--", *command, stdin=subprocess.PIPE)
    async with asyncio.timeout(DEADLINE_S):
        out, err = await process.communicate(b"m\n")
    assert (process.returncode, out) == (0, b"n\nm\n"), err
    assert f"at {place.url}".encode() in err
    assert [each["sandbox_id"] for each in await inside.json("ls")] == [place.sandbox_id]
