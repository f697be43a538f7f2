"""Folders out of a sandbox that lies: nothing is written where it should not be."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from sandmartin import AsyncSandbox
from sandmartin.client.trees import _stays_inside
from sandmartin.errors import Denied, Invalid, SandmartinError
from sandmartin.rpc.hostagent.v1 import hostagent_pb as pb
from tests.fakes_localagent import LocalAgent, serving


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncGenerator[LocalAgent, None]:
    (tmp_path / "root").mkdir()
    agent = LocalAgent(tmp_path / "root")
    async with serving(agent, tmp_path / "s"):
        yield agent


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "../x", "/x", "a\0b"])
async def test_a_name_that_leads_elsewhere_is_refused(
    agent: LocalAgent, tmp_path: Path, name: str
) -> None:
    async with await AsyncSandbox.create(url=f"unix:{tmp_path}/s") as sandbox:
        await sandbox.files.mkdir("/d")
        agent.lies = [pb.FileInfo(name=name, type="file", path="/d/x")]
        with pytest.raises(Denied, match="is refused"):
            await sandbox.files.download("/d", tmp_path / "here")
    assert not (tmp_path / "here").exists()
    assert not (tmp_path / "x").exists()


async def test_a_name_twice_leads_nowhere(agent: LocalAgent, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here" / "a").symlink_to("../elsewhere")
    async with await AsyncSandbox.create(url=f"unix:{tmp_path}/s") as sandbox:
        await sandbox.files.mkdir("/d/a")
        await sandbox.files.write("/d/a/b", "x")
        with pytest.raises(Invalid, match="is a link"):
            await sandbox.files.download("/d", tmp_path / "here")
        await sandbox.files.remove("/d/a")
        await sandbox.files.write("/d/a", "x")
        with pytest.raises(SandmartinError):
            await sandbox.files.download("/d", tmp_path / "here")
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("path", "text", "stays"),
    [
        ("a", "b", True),
        ("a", "./b//c/.", True),
        ("d/e/a", "../../b", True),
        ("d/a", "..", True),
        ("a", "..", False),
        ("d/a", "../../b", False),
        ("a", "/etc/passwd", False),
        ("a", "/", False),
        # Behind a name that may itself be a link, a step up could lead anywhere.
        ("d/a", "b/../c", False),
        ("d/e/a", "../b/..", False),
        ("a", "b\0", False),
    ],
)
def test_which_links_stay_inside(path: str, text: str, stays: bool) -> None:
    assert _stays_inside(path, text) is stays
