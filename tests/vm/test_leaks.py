"""The leak check itself: it must see what is planted."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from sandmartin.agent import namespace
from sandmartin.agent.limits import Allowance, ControlGroups
from sandmartin.agent.network import rules
from sandmartin.agent.network.slot import Slot
from sandmartin.model import Accel, Settings
from tests import leaks

_INSTANCE = "tstlks"
_Plant = Callable[[Settings, ExitStack], None]


def _slot(settings: Settings) -> Slot:
    ranges = settings.address_range, settings.link_range
    return Slot.of(99, _INSTANCE, *ranges, settings.uid_base)


def plant_process(settings: Settings, stack: ExitStack) -> None:
    name = f"{settings.data_dir}/sandboxes/sblost/vm"
    words = ["sh", "-c", "echo ready; read forever", name]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    stack.callback(process.wait)
    stack.callback(process.kill)
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        stack.callback(stream.close)
    assert process.stdout is not None
    process.stdout.readline()


def plant_directory(settings: Settings, stack: ExitStack) -> None:
    lost = settings.data_dir / "sandboxes" / "sblost"
    lost.mkdir(parents=True)
    stack.callback(lost.rmdir)


def plant_group(settings: Settings, stack: ExitStack) -> None:
    groups = ControlGroups(_INSTANCE)
    groups.open()
    stack.callback(groups.close)
    groups.create("sblost", Allowance.of(1, 128, Accel.TCG))
    stack.callback(groups.remove, "sblost")


def plant_mount(settings: Settings, stack: ExitStack) -> None:
    where = settings.data_dir / "mounted"
    where.mkdir(parents=True)
    stack.callback(where.rmdir)
    subprocess.run(["mount", "-t", "tmpfs", "none", where], check=True)
    stack.callback(lambda: subprocess.run(["umount", where], check=True))


def plant_slot(settings: Settings, stack: ExitStack) -> None:
    slot = _slot(settings)
    slot.make()
    stack.callback(slot.remove)


def plant_claim(settings: Settings, stack: ExitStack) -> None:
    claim = settings.run_dir / "slots" / "99"
    claim.parent.mkdir(parents=True, exist_ok=True)
    claim.touch()
    stack.callback(claim.unlink)


@pytest.mark.parametrize(
    "plant", [plant_process, plant_directory, plant_group, plant_mount, plant_slot, plant_claim]
)
def test_what_is_planted_is_seen(settings: Settings, plant: _Plant) -> None:
    where = (_INSTANCE, settings.data_dir, settings.run_dir)
    assert leaks.find_all(*where) == set()
    with ExitStack() as stack:
        plant(settings, stack)
        assert leaks.find_all(*where), plant.__name__
    assert leaks.find_all(*where) == set()


async def test_rules_that_are_planted_are_seen(settings: Settings) -> None:
    where = (_INSTANCE, settings.data_dir, settings.run_dir)
    await rules.load(rules.host_rules(_INSTANCE, settings.address_range, ()))
    try:
        seen = await asyncio.to_thread(leaks.find_all, *where)
        assert any(each.startswith("nft") for each in seen)
    finally:
        await rules.remove_host_table(_INSTANCE)
    assert await asyncio.to_thread(leaks.find_all, *where) == set()
    assert not namespace.path_of_slot(_INSTANCE, 99).exists()
