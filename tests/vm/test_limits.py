"""Control groups of this machine: the limits are in force, and nothing of them is left behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sandmartin.agent import proc
from sandmartin.agent.limits import Allowance, ControlGroups
from sandmartin.agent.vmm import VmStatus
from sandmartin.errors import ToolFailed
from sandmartin.model import Accel, random_id
from tests.vm import bare
from tests.vm.bare import running, vm_directory

pytestmark = [pytest.mark.vm, pytest.mark.root]

_ENTER = 'for group do echo 0 >"$group/cgroup.procs" || exit 99; done; '


@pytest.fixture
def groups() -> Iterator[ControlGroups]:
    """The groups of an agent; a test must have removed the VMs' own."""
    made = ControlGroups(random_id(6))
    made.open()
    yield made
    left = made.list()
    for name in left:
        made.kill(name)
        made.remove(name)
    made.close()
    assert left == set()
    assert _of_agent(made) == []


def _of_agent(groups: ControlGroups) -> list[Path]:
    return [top for top in groups._tops() if top.exists()]


def _inside(group: tuple[Path, ...], script: str) -> list[str]:
    return ["/bin/sh", "-c", _ENTER + script, "sh", *map(os.fspath, group)]


def _read(group: tuple[Path, ...], *names: str) -> str:
    """The first of the control files that is there."""
    for name in names:
        for directory in group:
            if (directory / name).exists():
                return (directory / name).read_text().strip()
    raise AssertionError(f"no {names} in {group}")


def test_limits_are_those_asked_for(groups: ControlGroups) -> None:
    group = groups.create("sbone", Allowance(cpus=1.5, memory_mb=100, processes=7))
    assert groups.list() == {"sbone"}
    assert _read(group, "memory.max", "memory.limit_in_bytes") == str(100 << 20)
    assert _read(group, "pids.max") == "7"
    quota, period = "cpu.cfs_quota_us", "cpu.cfs_period_us"
    cpu = _read(group, "cpu.max", quota)
    assert cpu in {"150000 100000", "150000"}
    if groups.version == 1:
        assert _read(group, period) == "100000"
        if (group[1] / "memory.memsw.limit_in_bytes").exists():
            assert _read(group, "memory.memsw.limit_in_bytes") == str(100 << 20)
    groups.remove("sbone")
    groups.remove("sbone")


async def test_memory_hog_is_killed(groups: ControlGroups, tmp_path: Path) -> None:
    group = groups.create("sbone", Allowance(cpus=1, memory_mb=32))
    hog = proc.spawn_detached(_inside(group, "exec tail /dev/zero"), output=tmp_path / "said")
    assert await hog.gone(30)
    await asyncio.to_thread(groups.remove, "sbone")


async def test_processes_and_processor_time_are_bounded(groups: ControlGroups) -> None:
    group = groups.create("sbone", Allowance(cpus=0.1, memory_mb=64, processes=4))
    script = "for each in 1 2 3 4 5 6; do sleep 100 >/dev/null 2>&1 & done"
    done = await proc.run(_inside(group, script), check=False)
    assert done.returncode != 0
    assert b"fork" in done.stderr.lower()
    groups.kill("sbone")
    busy = asyncio.ensure_future(
        proc.run(_inside(group, "while :; do :; done"), check=False, deadline_s=30)
    )

    async def throttled() -> bool:
        stat = dict(line.split() for line in _read(group, "cpu.stat").splitlines())
        return int(stat["nr_throttled"]) > 0

    await bare.eventually(throttled)
    # Whoever starts anew finds what is left by its group, and ends it.
    groups.kill("sbone")
    assert (await busy).returncode == -9
    await asyncio.to_thread(groups.remove, "sbone")


async def test_group_that_is_held_is_not_removed(groups: ControlGroups, tmp_path: Path) -> None:
    group = groups.create("sbone", Allowance(cpus=1, memory_mb=64))
    held = proc.spawn_detached(_inside(group, "exec sleep 100"), output=tmp_path / "said")
    await bare.eventually(lambda: asyncio.sleep(0, str(held.pid) in _read(group, "cgroup.procs")))
    with pytest.raises(ToolFailed, match="cannot be removed"):
        await asyncio.to_thread(groups.remove, "sbone", 0.1)
    assert held.kill()
    assert await held.gone(5)
    await asyncio.to_thread(groups.remove, "sbone")


def test_half_made_group_is_taken_back(groups: ControlGroups) -> None:
    with pytest.raises(ToolFailed, match="sbone"):
        groups.create("sbone", Allowance(cpus=1, memory_mb=64, processes=-7))
    assert groups.list() == set()


async def test_vm_that_outgrows_its_memory_is_killed_and_seen_to_end(groups: ControlGroups) -> None:
    allowance = Allowance.of(1, 128, Accel.TCG)
    # Enough to start (34 MB) and too little to boot (188 MB): as if the monitor leaked.
    group = groups.create("sbone", replace(allowance, memory_mb=110))
    with vm_directory() as directory:
        spec = replace(bare.make_spec(directory), cgroups=group)
        async with running(spec) as machine:
            await asyncio.wait_for(machine.vm.wait_gone(), bare.BOOT_DEADLINE_S)
            assert await machine.vm.status() is VmStatus.GONE
    await asyncio.to_thread(groups.remove, "sbone")


async def test_vm_runs_in_its_group_within_its_overhead(groups: ControlGroups) -> None:
    group = groups.create("sbone", Allowance.of(1, 128, Accel.TCG))
    with vm_directory() as directory:
        spec = replace(bare.make_spec(directory), cgroups=group)
        async with running(spec) as machine:
            await machine.hear("guest: ready")
            assert all(_read((each,), "cgroup.procs") == str(machine.pid) for each in group)
    await asyncio.to_thread(groups.remove, "sbone")
