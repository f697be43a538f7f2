"""Sampling of real processes, in the control groups that this host has, and what it costs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sandmartin.agent.limits import ControlGroups
from sandmartin.agent.metrics import PERIOD_S, Sampler
from sandmartin.agent.proc import ProcessId

_DEADLINE_S = 30.0
_CGROUPS = Path("/sys/fs/cgroup")
#: Uses two processors where it can, in threads, as a VM does.
_BUSY = """
import hashlib, threading
def work():
    while True:
        hashlib.sha256(bytes(1 << 20))
for _ in range(2):
    threading.Thread(target=work).start()
"""


@dataclass
class Vm:
    """A process in place of a VM."""

    process: ProcessId
    groups: tuple[Path, ...] = ()
    layers: tuple[Path, ...] = ()

    async def memory(self) -> int | None:
        return None


@contextlib.contextmanager
def _process(*argv: str) -> Iterator[ProcessId]:
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    try:
        process = ProcessId.of(child.pid)
        assert process is not None
        yield process
    finally:
        child.kill()
        child.wait(_DEADLINE_S)


# A test that puts it into a group names the group first: this one ends first then.
@pytest.fixture
def busy() -> Iterator[ProcessId]:
    with _process(sys.executable, "-c", _BUSY) as process:
        yield process


@pytest.fixture
def group() -> Iterator[Path]:
    """A group of this host that counts processor time."""
    unified = ControlGroups("none").version == 2
    path = (_CGROUPS if unified else _CGROUPS / "cpuacct") / f"smtest-{os.getpid()}"
    path.mkdir()
    yield path
    until = time.monotonic() + _DEADLINE_S
    while path.exists():
        try:
            path.rmdir()
        except OSError:
            assert time.monotonic() < until, "the group is held"
            time.sleep(0.005)


def _enter(process: ProcessId, group: Path) -> None:
    (group / "cgroup.procs").write_text(str(process.pid))


def _used_ticks(process: ProcessId) -> int:
    """utime and stime of proc(5), in 1/100 s."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _use(process: ProcessId, ticks: int) -> None:
    """Wait until a process has used so much more processor time."""
    goal, until = _used_ticks(process) + ticks, time.monotonic() + _DEADLINE_S
    while _used_ticks(process) < goal:
        assert time.monotonic() < until, "the process gets no time"
        time.sleep(0.01)


def _check_busy(vm: Vm) -> None:
    """A process that works is seen to use what the kernel says it used."""
    sampler = Sampler(patience_s=0)
    # It is at work, and no longer starting.
    _use(vm.process, 5)
    begin, before = time.monotonic(), _used_ticks(vm.process)
    sampler.add("sbbusy", vm)
    _use(vm.process, 100)
    elapsed_s, used_s = time.monotonic() - begin, (_used_ticks(vm.process) - before) / 100
    sampler.sample()
    (point,) = sampler.get("sbbusy", "10m")
    assert point.cpu_pct == pytest.approx(100 * used_s / elapsed_s, rel=0.1)
    sampler.close()


def _check_end(vm: Vm) -> None:
    """An idle VM uses nothing; one that has ended is sampled no more, and the pass goes on."""
    sampler = Sampler(patience_s=0, monotonic=_Leaping().monotonic)
    sampler.add("sbidle", vm)
    sampler.sample()
    points = sampler.get("sbidle", "10m")
    assert [point.cpu_pct < 20 for point in points] == [True]
    vm.process.kill()
    for group in vm.groups:
        _remove_when_empty(group)
    os.waitid(os.P_PID, vm.process.pid, os.WEXITED | os.WNOWAIT)
    sampler.sample()
    assert sampler.get("sbidle", "10m") == points
    sampler.close()


def _remove_when_empty(group: Path) -> None:
    until = time.monotonic() + _DEADLINE_S
    while (group / "cgroup.procs").read_text():
        assert time.monotonic() < until
        time.sleep(0.005)
    group.rmdir()


def test_busy_process_without_a_group(busy: ProcessId, tmp_path: Path) -> None:
    # As the `cpu` group of a v1 host is where `cpuacct` lies apart: of no use for this.
    (tmp_path / "cpu.stat").write_text("nr_periods 1\nnr_throttled 0\nthrottled_time 0\n")
    _check_busy(Vm(busy, groups=(tmp_path,)))


@pytest.mark.root
def test_busy_process_in_its_group(group: Path, busy: ProcessId) -> None:
    _enter(busy, group)
    _check_busy(Vm(busy, groups=(group,)))


@pytest.mark.root
def test_group_counts_and_not_the_process(group: Path, busy: ProcessId) -> None:
    # An empty group uses nothing, whatever the process named beside it does.
    sampler = Sampler(patience_s=0)
    sampler.add("sbempty", Vm(busy, groups=(group,)))
    _use(busy, 10)
    sampler.sample()
    (point,) = sampler.get("sbempty", "10m")
    assert point.cpu_pct == 0
    sampler.close()


def test_ended_process_is_sampled_no_more() -> None:
    with _process("sleep", "600") as process:
        _check_end(Vm(process))


@pytest.mark.root
def test_removed_group_is_sampled_no_more(group: Path) -> None:
    with _process("sleep", "600") as process:
        _enter(process, group)
        _check_end(Vm(process, groups=(group,)))


_PASSES = 100
_SANDBOXES = 50


def _cost(vms: list[Vm]) -> float:
    """The share of one core that sampling takes."""
    sampler = Sampler(patience_s=0, monotonic=_Leaping().monotonic)
    for number, vm in enumerate(vms):
        sampler.add(f"sb{number}", vm)
    before = time.thread_time()
    for _ in range(_PASSES):
        sampler.sample()
    used_s = time.thread_time() - before
    assert all(len(sampler.get(f"sb{n}", "10m")) == _PASSES for n in range(len(vms)))
    sampler.close()
    return used_s / (_PASSES * PERIOD_S)


def _check_cost(share: float) -> None:
    print(f"sampling {_SANDBOXES} sandboxes takes {share:.2%} of a core")
    # Far above what it takes, so that a busy machine does not matter.
    assert share < 0.1


class _Leaping:
    """A clock that goes on by much each time it is read, so that passes need not wait."""

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        self._now += PERIOD_S
        return self._now


def _layers(directory: Path, number: int) -> tuple[Path, ...]:
    layer = directory / f"{number}.qcow2"
    layer.write_bytes(bytes(4096))
    return (layer,)


def test_cost_by_process(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        vms = [
            Vm(stack.enter_context(_process("sleep", "600")), layers=_layers(tmp_path, number))
            for number in range(_SANDBOXES)
        ]
        share = _cost(vms)
    _check_cost(share)


@pytest.mark.root
def test_cost_by_group(group: Path, tmp_path: Path) -> None:
    me = ProcessId.of(os.getpid())
    assert me is not None
    groups = [group / str(number) for number in range(_SANDBOXES)]
    with contextlib.ExitStack() as stack:
        for path in groups:
            path.mkdir()
            stack.callback(path.rmdir)
        vms = [Vm(me, (path,), _layers(tmp_path, n)) for n, path in enumerate(groups)]
        share = _cost(vms)
    _check_cost(share)
