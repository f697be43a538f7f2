"""A replica dies by SIGKILL in the middle of each operation; another one finishes or undoes it.

The replica that dies is a process of its own, forked for each case from one that has imported
everything. The host lives on, and so does this test's replica, which takes over.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from sandmartin.control.caller import Caller, system
from sandmartin.control.operations import Kind
from sandmartin.control.platform import Platform, open_platform
from sandmartin.control.requests import NewChildren, NewRow
from sandmartin.control.settings import ControlSettings
from sandmartin.model import State
from tests.control.conftest import DEADLINE_S, PACE, TIMING, RunningHost, make_team
from tests.control.truth import agree, rows_of, templates_of
from tests.fakes_vmm import SCRATCH

pytestmark = [pytest.mark.qemu_img, pytest.mark.one_database]

#: What is killed, and what of it is at work.
OPERATIONS = {
    "create": Kind.CREATE,
    "pause": Kind.PAUSE,
    "resume": Kind.RESUME,
    "destroy": Kind.DESTROY,
    "fork": Kind.FORK,
    "snapshot": Kind.SNAPSHOT,
    "live": Kind.SNAPSHOT,
    "asleep": Kind.SNAPSHOT,
    "checkpoint": Kind.CHECKPOINT,
    "rollback": Kind.ROLLBACK,
}
#: Between "row changed" and "RPC sent", and between "RPC done" and "row changed".
MOMENTS = ("begun", "done")
THEN, NOW = b"as it was then", b"as it is today"
_AT_ONCE = 6


@dataclass(frozen=True)
class Case:
    """One replica's death."""

    operation: str
    moment: str
    sandbox_id: str = ""
    checkpoint_id: str = ""

    @property
    def name(self) -> str:
        return f"{self.operation}-{self.moment}"


def new_row(**labels: str) -> NewRow:
    return NewRow(memory_mb=128, disk_size_mb=8, labels=labels)


async def operate(platform: Platform, caller: Caller, case: Case) -> None:
    """Begin what the replica dies of."""
    sandboxes, one = platform.sandboxes, case.sandbox_id
    match case.operation:
        case "create":
            await sandboxes.create(caller, new_row(case=case.name))
        case "pause":
            await sandboxes.pause(caller, one)
        case "resume":
            await sandboxes.resume(caller, one)
        case "destroy":
            await sandboxes.destroy(caller, one)
        case "fork":
            await sandboxes.fork(caller, NewChildren(sandbox_id=one, count=2))
        case "snapshot" | "live" | "asleep":
            await sandboxes.snapshot(caller, one, case.name, live=case.operation == "live")
        case "checkpoint":
            await sandboxes.checkpoint(caller, one)
        case "rollback":
            await sandboxes.rollback(caller, one, case.checkpoint_id)


async def _die(settings: ControlSettings, team_id: str, case: Case) -> None:
    def step(name: str) -> None:
        if name == f"{OPERATIONS[case.operation]}:{case.moment}":
            os.kill(os.getpid(), signal.SIGKILL)

    async with open_platform(settings, timing=TIMING, pace=PACE) as platform:
        platform.operations.step = step
        await operate(platform, system(team_id), case)


def main() -> None:
    """Play the replicas of the cases in argv, some at a time; how each ended, as JSON."""
    asked = json.loads(sys.argv[1])
    settings = ControlSettings(data_dir=Path(asked["data_dir"]), database_url=asked["url"])
    cases = [Case(*each) for each in asked["cases"]]
    ends: list[int] = []
    for at in range(0, len(cases), _AT_ONCE):
        replicas = []
        for case in cases[at : at + _AT_ONCE]:
            if (child := os.fork()) == 0:
                try:
                    asyncio.run(_die(settings, asked["team_id"], case))
                finally:
                    os._exit(0)
            replicas.append(child)
        ends += [os.waitpid(replica, 0)[1] for replica in replicas]
    print(json.dumps(ends))


async def kill_replicas(platform: Platform, team_id: str, cases: list[Case]) -> None:
    """Let a replica die for each case, beside this one."""
    words = {
        "data_dir": os.fspath(platform.settings.data_dir),
        "url": platform.settings.url,
        "team_id": team_id,
        "cases": [[c.operation, c.moment, c.sandbox_id, c.checkpoint_id] for c in cases],
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.control.test_crash", json.dumps(words)),
        cwd=Path(__file__).parents[2],
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(3 * DEADLINE_S):
        printed, _ = await process.communicate()
    for case, status in zip(cases, json.loads(printed), strict=True):
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed, f"{case.name}: the replica ended with status {status}"


async def prepare(platform: Platform, host: RunningHost, caller: Caller, case: Case) -> Case:
    """The sandbox that it happens to, with something in its memory."""
    if case.operation == "create":
        return case
    sandboxes = platform.sandboxes
    sandbox_id = (await sandboxes.create(caller, new_row())).sandbox_id
    host.fakes.vmm.vms[sandbox_id].write(SCRATCH, THEN)
    checkpoint_id = ""
    if case.operation == "rollback":
        checkpoint_id = (await sandboxes.checkpoint(caller, sandbox_id)).checkpoint_id
        host.fakes.vmm.vms[sandbox_id].write(SCRATCH, NOW)
    if case.operation in {"resume", "asleep"}:
        await sandboxes.pause(caller, sandbox_id)
    return Case(case.operation, case.moment, sandbox_id, checkpoint_id)


#: What the sandbox is afterwards where it is not running.
_AFTER = {
    "pause": State.PAUSED,
    "snapshot": State.PAUSED,
    "asleep": State.PAUSED,
    "destroy": State.STOPPED,
}


async def test_killed_in_the_middle_of_every_operation(
    platform: Platform, host: RunningHost
) -> None:
    team_id, _ = await make_team(platform)
    caller = system(team_id)
    asked = [Case(operation, moment) for operation in OPERATIONS for moment in MOMENTS]
    cases = [await prepare(platform, host, caller, case) for case in asked]
    await kill_replicas(platform, team_id, cases)
    await agree(platform, host)
    rows = await rows_of(platform)
    names = {each.name for each in await templates_of(platform)}
    for case in cases:
        if case.operation == "create":
            (row,) = [each for each in rows.values() if each.labels.get("case") == case.name]
        else:
            row = rows[case.sandbox_id]
        assert row.state == _AFTER.get(case.operation, State.RUNNING), case.name
        children = [each for each in rows.values() if each.parent_id == row.sandbox_id]
        states = [each.state for each in children]
        assert states == [State.RUNNING] * (2 if case.operation == "fork" else 0), case.name
        made = OPERATIONS[case.operation] is Kind.SNAPSHOT
        assert (case.name in names) is made, case.name
        if case.operation == "checkpoint":
            count = len(await platform.sandboxes.checkpoints(caller, row.sandbox_id))
            assert count == (0 if case.moment == "begun" else 1), case.name
        if row.state == State.PAUSED:
            await platform.sandboxes.resume(caller, row.sandbox_id)
        if case.operation not in {"create", "destroy"}:
            for each in (row, *children):
                assert host.fakes.vmm.vms[each.sandbox_id].read(SCRATCH, len(THEN)) == THEN
    await agree(platform, host)


if __name__ == "__main__":
    main()
