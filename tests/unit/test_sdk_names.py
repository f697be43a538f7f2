"""The public face of the SDK: its names, its types, and that it costs nothing until it is used."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sandmartin
from sandmartin.client import asynchronous, synchronous
from sandmartin.client.commands import AsyncCommands
from sandmartin.client.facade import Facade
from sandmartin.client.files import AsyncFiles
from sandmartin.client.git import AsyncGit
from sandmartin.client.handle import AsyncCommandHandle
from sandmartin.client.pty import AsyncPty
from sandmartin.client.templates import AsyncTemplates
from sandmartin.client.watch import AsyncWatch

ROOT = Path(__file__).parents[2]
PAIRS = [
    (asynchronous.AsyncSandbox, synchronous.Sandbox),
    (AsyncCommands, synchronous.Commands),
    (AsyncCommandHandle, synchronous.CommandHandle),
    (AsyncPty, synchronous.Pty),
    (AsyncFiles, synchronous.Files),
    (AsyncWatch, synchronous.Watch),
    (AsyncGit, synchronous.Git),
    (AsyncTemplates, synchronous.Templates),
]
_TWINS = {"__aiter__": "__iter__", "__aenter__": "__enter__", "__aexit__": "__exit__"}


@pytest.mark.parametrize(("inner", "outer"), PAIRS, ids=lambda each: each.__name__)
def test_who_waits_lacks_nothing(inner: type, outer: type) -> None:
    own = {name for name in vars(inner) if not name.startswith("_") or name in _TWINS}
    missing = {_TWINS.get(name, name) for name in own} - set(dir(outer))
    assert not missing
    more = {name for name in vars(outer) if not name.startswith("_")} - own - {"pid"}
    assert not more
    assert issubclass(outer, Facade)
    for name in own - set(_TWINS):
        asked, given = inspect.getattr_static(inner, name), inspect.getattr_static(outer, name)
        if not isinstance(asked, property) and name != "run":
            original = inspect.unwrap(getattr(given, "__func__", given))
            assert getattr(original, "__func__", original) is getattr(asked, "__func__", asked)
            assert original.__doc__, name


def test_every_name_is_there() -> None:
    assert {"Sandbox", "AsyncSandbox", "__version__"} <= set(dir(sandmartin))
    for name in sandmartin._HOME_OF:
        assert getattr(sandmartin, name).__name__ == name
    with pytest.raises(AttributeError, match="NoSuchName"):
        _ = sandmartin.NoSuchName  # type: ignore[attr-defined]


def test_every_name_is_typed() -> None:
    text = Path(sandmartin.__file__).read_text()
    for name in sandmartin._HOME_OF:
        assert f"import {name} as {name}\n" in text, name


def test_the_package_alone_is_light() -> None:
    script = "import sandmartin, sys; print([m for m in ('httpx', 'asyncio') if m in sys.modules])"
    words = [sys.executable, "-P", "-c", script]
    assert subprocess.run(words, capture_output=True, check=True, text=True).stdout == "[]\n"


def test_types_as_a_user_sees_them(tmp_path: Path) -> None:
    # None of our own settings, which a user does not have.
    settings = tmp_path / "mypy.ini"
    settings.write_text("[mypy]\nstrict = true\n")
    cache = ROOT / ".mypy_cache" / "program"
    words = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(settings),
        "--cache-dir",
        str(cache),
    ]
    checked = subprocess.run(
        [*words, "--no-error-summary", "-c", _PROGRAM],
        env=os.environ | {"MYPYPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    found = [each.removeprefix("<string>:") for each in checked.stdout.splitlines()]
    wrong = [number for number, line in enumerate(_PROGRAM.splitlines(), 1) if "# wrong" in line]
    errors = {int(each.partition(":")[0]) for each in found if " error: " in each}
    assert errors == set(wrong), (found, checked.stderr)


_PROGRAM = """\
from collections.abc import AsyncIterator, Iterator
from typing import assert_type

from sandmartin import (
    AsyncCommandHandle, AsyncSandbox, CommandHandle, CommandResult, Execution, FileEvent,
    FileInfo, GitStatus, Sandbox, SandboxInfo,
)
from sandmartin import NoSuchName  # wrong


def blocking() -> None:
    with Sandbox.create("base", timeout=300, memory_mb=512) as sandbox:
        assert_type(sandbox, Sandbox)
        assert_type(sandbox.commands.run("true"), CommandResult)
        assert_type(sandbox.commands.run(["true"], background=True), CommandHandle)
        assert_type(sandbox.files.read("/a"), str)
        assert_type(sandbox.files.read("/a", format="bytes"), bytes)
        assert_type(sandbox.files.stream("/a"), Iterator[bytes])
        assert_type(sandbox.files.list("/"), tuple[FileInfo, ...])
        assert_type(sandbox.fork(2), tuple[Sandbox, ...])
        assert_type(sandbox.run_code("1"), Execution)
        assert_type(sandbox.git.status("/r"), GitStatus)
        assert_type(sandbox.pty.create(80, 24), CommandHandle)
        for event in sandbox.files.watch("/"):
            assert_type(event, FileEvent)
    assert_type(Sandbox.list(), Iterator[SandboxInfo])
    assert_type(Sandbox.connect("sb1"), Sandbox)
    sandbox.commands.run(1)  # wrong
    sandbox.files.write("/a")  # wrong
    Sandbox.create(memory="1G")  # wrong
    sandbox.nothing()  # wrong


async def asynchronous() -> None:
    async with await AsyncSandbox.create() as sandbox:
        assert_type(await sandbox.commands.run("true"), CommandResult)
        assert_type(await sandbox.commands.run("true", background=True), AsyncCommandHandle)
        assert_type(await sandbox.fork(2), tuple[AsyncSandbox, ...])
        async for event in await sandbox.files.watch("/"):
            assert_type(event, FileEvent)
        async for info in AsyncSandbox.list(states=["running"]):
            assert_type(info, SandboxInfo)
"""
