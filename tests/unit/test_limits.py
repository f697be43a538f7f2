"""Control groups: what is written where, on a plain tree of files that looks like either version.

On the real hierarchy of this machine they are tested with the VMs.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from sandmartin.agent.limits import OVERHEAD_MB, Allowance, ControlGroups
from sandmartin.errors import ToolFailed
from sandmartin.model import Accel

_ALLOWANCE = Allowance(cpus=2.5, memory_mb=640, processes=50)


@pytest.fixture
def unified(tmp_path: Path) -> Path:
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids")
    return tmp_path


def _written(group: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in group.iterdir() if path.is_file()}


def test_allowance_has_the_monitors_share_on_top() -> None:
    allowance = Allowance.of(2, 512, Accel.TCG)
    assert allowance.memory_mb == 512 + OVERHEAD_MB[Accel.TCG]
    assert 2 < allowance.cpus <= 3


def test_unified_hierarchy(unified: Path) -> None:
    groups = ControlGroups("abc", unified)
    groups.open()
    assert groups.version == 2
    top = unified / "sandmartin-abc"
    # Controllers reach a group only if each one above it hands them down.
    assert (unified / "cgroup.subtree_control").read_text() == "+pids"
    assert (top / "cgroup.subtree_control").read_text() == "+pids"
    assert groups.create("sbone", _ALLOWANCE) == (top / "sbone",)
    assert _written(top / "sbone") == {
        "cpu.max": "250000 100000",
        "cpu.weight": "250",
        "memory.max": str(640 << 20),
        "memory.oom.group": "1",
        "pids.max": "50",
    }
    assert groups.list() == {"sbone"}


@pytest.mark.parametrize("swap", [True, False])
def test_separate_hierarchies(tmp_path: Path, swap: bool) -> None:
    # A hybrid host mounts the unified one beside them, without controllers.
    for name in ("cpu", "memory", "pids", "unified"):
        (tmp_path / name).mkdir()
    groups = ControlGroups("abc", tmp_path)
    groups.open()
    assert groups.version == 1
    memory = tmp_path / "memory" / "sandmartin-abc" / "sbone"
    memory.mkdir()
    if swap:
        (memory / "memory.memsw.limit_in_bytes").touch()
    made = groups.create("sbone", _ALLOWANCE)
    assert [path.parent.parent.name for path in made] == ["cpu", "memory", "pids"]
    assert _written(made[0]) == {
        "cpu.cfs_period_us": "100000",
        "cpu.cfs_quota_us": "250000",
        "cpu.shares": "2560",
    }
    both = {"memory.memsw.limit_in_bytes": str(640 << 20)} if swap else {}
    assert _written(memory) == {"memory.limit_in_bytes": str(640 << 20)} | both
    assert _written(made[2]) == {"pids.max": "50"}


def test_swap_is_bounded_on_the_unified_hierarchy_too(unified: Path) -> None:
    groups = ControlGroups("abc", unified)
    groups.open()
    group = unified / "sandmartin-abc" / "sbone"
    group.mkdir()
    (group / "memory.swap.max").touch()
    groups.create("sbone", _ALLOWANCE)
    assert (group / "memory.swap.max").read_text() == str(640 << 20)


def test_only_our_own_are_listed_and_nothing_is_no_error(unified: Path) -> None:
    mine, other = ControlGroups("abc", unified), ControlGroups("xyz", unified)
    assert mine.list() == set()
    for groups in (mine, other):
        groups.open()
    other.create("sbother", _ALLOWANCE)
    assert mine.list() == set()
    mine.kill("sbother")
    mine.remove("sbother")
    assert other.list() == {"sbother"}


def test_process_of_another_namespace_is_not_taken_for_our_own_group(unified: Path) -> None:
    groups = ControlGroups("abc", unified)
    groups.open()
    (group,) = groups.create("sbone", _ALLOWANCE)
    gone = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(gone, 0)
    # A signal to 0 would be one to us.
    (group / "cgroup.procs").write_text(f"0\n{gone}\n")
    groups.kill("sbone")


def test_a_host_that_refuses_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "sandmartin-abc").write_text("in the way")
    groups = ControlGroups("abc", tmp_path)
    with pytest.raises(ToolFailed, match=os.strerror(errno.EEXIST)) as caught:
        groups.open()
    assert "root" in caught.value.hint
    with pytest.raises(ToolFailed, match="sbone"):
        groups.create("sbone", _ALLOWANCE)
