"""`sandmartin cp`, against an agent whose sandboxes are directories."""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

import pytest

from sandmartin.cli import main
from sandmartin.cli.files import Remote, place_of
from sandmartin.cli.progress import Progress
from sandmartin.rpc.hostagent.v1 import hostagent_pb as pb
from tests.command_line import DEADLINE_S
from tests.fakes_localagent import LocalAgent, serving

Copying = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncGenerator[LocalAgent, None]:
    (tmp_path / "root" / "sb1").mkdir(parents=True)
    agent = LocalAgent(tmp_path / "root")
    async with serving(agent, tmp_path / "agent.sock"):
        yield agent


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    """The sandbox's files."""
    return tmp_path / "root" / "sb1"


@pytest.fixture
def copy(agent: LocalAgent, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Copying:
    async def copy(*words: object) -> tuple[int, str, str]:
        argv = ["cp", *map(str, words), "--data-dir", os.fspath(tmp_path)]
        async with asyncio.timeout(DEADLINE_S):
            code = await asyncio.to_thread(main, argv)
        return code, *capsys.readouterr()

    return copy


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with all that trees have."""
    tree = tmp_path / "tree"
    (tree / "empty").mkdir(parents=True)
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "b" / "ü file").write_bytes(os.urandom(400_000))
    (tree / "none").write_bytes(b"")
    (tree / "script").write_text("#!/bin/sh\n")
    (tree / "script").chmod(0o755)
    (tree / "a" / "secret").symlink_to("/etc/passwd")
    (tree / "a" / "loop").symlink_to("..")
    os.mkfifo(tree / "fifo")
    return tree


def content(root: Path) -> dict[str, bytes | None]:
    """Files and directories below `root`, links and the like left out."""
    return {
        os.fspath(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in root.rglob("*")
        if not path.is_symlink() and (path.is_dir() or path.is_file())
    }


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("sb1:/a:b", Remote("sb1", "/a:b")),
        ("sb1:a", Remote("sb1", "a")),
        ("./sb1:/a", "./sb1:/a"),
        ("/x/sb1:a", "/x/sb1:a"),
        ("tree/.", "tree/."),
    ],
)
def test_a_colon_makes_a_place_in_a_sandbox(text: str, place: Remote | str) -> None:
    assert place_of(text) == place


async def test_a_file_goes_in_and_comes_out(copy: Copying, inside: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(1_000_000))
    assert await copy(file, "sb1:/renamed") == (0, "", "")
    code, out, err = await copy("sb1:/renamed", tmp_path / "back", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"files": 1, "bytes": 1_000_000, "left_out": [], "failed": []}
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    # Into directories, those that are there and those that a slash says will be.
    (inside / "there").mkdir()
    (tmp_path / "here").mkdir()
    assert (await copy(file, "sb1:/there"))[0] == 0
    assert (await copy("sb1:/there/file", tmp_path / "here"))[0] == 0
    for path in (inside / "there" / "file", tmp_path / "here" / "file"):
        assert path.read_bytes() == file.read_bytes()


async def test_a_tree_goes_in_and_comes_out_without_its_links(
    copy: Copying, inside: Path, tree: Path, tmp_path: Path
) -> None:
    code, _, err = await copy("-r", tree, "sb1:/to/new")
    assert code == 0
    assert content(inside / "to" / "new") == content(tree)
    left_out = {line.rpartition(" ")[2] for line in err.splitlines()}
    assert left_out == {f"{tree}/a/secret", f"{tree}/a/loop", f"{tree}/fifo"}

    (inside / "to" / "new" / "link").symlink_to("/etc")
    (inside / "to" / "new" / "script").chmod(0o755)
    (tmp_path / "back").mkdir()
    code, out, err = await copy("-r", "sb1:/to/new", tmp_path / "back", "--json")
    assert (code, json.loads(out)["left_out"]) == (0, ["/to/new/link"])
    assert content(tmp_path / "back" / "new") == content(tree)
    assert os.access(tmp_path / "back" / "new" / "script", os.X_OK)
    assert (tmp_path / "back" / "new" / "none").stat().st_mode & 0o111 == 0
    # Once more, into what is there; and the content alone.
    assert (await copy("-r", tree, "sb1:/to"))[0] == 0
    assert content(inside / "to" / "tree") == content(tree)
    for there in ("sb1:/to/new", "sb1:/to/newer/"):
        assert (await copy("-r", f"{tree}/.", there))[0] == 0
    for there in ("new", "newer"):
        assert content(inside / "to" / there) == content(tree)
    assert (await copy("-r", "sb1:/to/tree/.", tmp_path / "back" / "new"))[0] == 0
    assert content(tmp_path / "back" / "new") == content(tree)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("tree", "sb1:/x"), "tree is a directory\nhint: copy it with -r"),
        (("sb1:/", "x"), "/ is a directory\nhint: copy it with -r"),
        (("missing", "sb1:/x"), "missing cannot be read: No such file or directory"),
        (("sb1:/missing", "x"), "/missing does not exist"),
        (("sb1:/file", "no/such/place"), "no/such/place cannot be written"),
        (("sb1:/file", "new/"), "there is no directory new/\nhint: mkdir new/"),
        (("-r", "sb1:/", "tree/script"), "tree/script cannot be made: File exists"),
        (("tree/none", "sb2:/x"), "there is no sandbox sb2"),
    ],
)
async def test_what_cannot_be_copied_is_told(
    copy: Copying,
    inside: Path,
    tree: Path,
    words: tuple[str, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (inside / "file").write_text("content")
    monkeypatch.chdir(tree.parent)
    code, out, err = await copy(*words)
    assert (code, out) == (1, "")
    assert err.startswith(f"sandmartin: {says}")
    assert not (inside / "x").exists()


async def test_a_file_that_cannot_be_read_costs_neither_the_others_nor_the_one_that_is_here(
    copy: Copying, agent: LocalAgent, inside: Path, tmp_path: Path
) -> None:
    (inside / "there").write_text("new")
    (tmp_path / "gone").write_text("precious")
    agent.lies = [pb.FileInfo(name=each, type="file") for each in ("gone", "there")]
    code, out, err = await copy("-r", "sb1:/", tmp_path, "--json")
    assert code == 1
    assert json.loads(out) == {"files": 1, "bytes": 3, "left_out": [], "failed": ["/gone"]}
    assert err == "sandmartin: /gone does not exist\n"
    assert (tmp_path / "gone").read_text() == "precious"
    assert (tmp_path / "there").read_text() == "new"


async def test_a_full_disk_ends_the_copying(copy: Copying, agent: LocalAgent, inside: Path) -> None:
    (inside / "file").write_text("content")
    code, _, err = await copy("sb1:/file", "/dev/full")
    assert (code, err) == (1, "sandmartin: /dev/full cannot be written: No space left on device\n")


@pytest.mark.parametrize("name", ["../stolen", "..", ".", "", "/etc/x", "a\0b"])
async def test_a_name_that_leads_elsewhere_is_refused(
    copy: Copying, agent: LocalAgent, inside: Path, tmp_path: Path, name: str
) -> None:
    (inside / "d").mkdir()
    (inside / "stolen").write_text("x")
    agent.lies = [pb.FileInfo(name=name, type="file")]
    (tmp_path / "to").mkdir()
    code, _, err = await copy("-r", "sb1:/d", tmp_path / "to")
    assert code == 1
    assert "the sandbox lists a file named" in err
    assert content(tmp_path / "to") == {"d": None}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    for stderr in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stderr)
        with (progress := Progress()).of("a\x1b[2Jb\n", 4 * 2**20):
            progress.add(3 * 2**20)
        shown.append(stderr.getvalue())
    drawn, cleared = shown[0].split("\r")[1:3]
    assert drawn.endswith("b   3.0 of 4.0 MiB (75%)")
    assert cleared.isspace()
    assert "\x1b" not in shown[0]
    assert shown[1] == ""
