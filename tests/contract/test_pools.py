"""What is started ahead: taken when it fits, replaced, never in the way, and never left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from sandmartin.agent.admission import memory_total_mb
from sandmartin.agent.guest import Command, Identity, Output
from sandmartin.agent.host import Host
from sandmartin.agent.limits import OVERHEAD_MB
from sandmartin.agent.network.slot import Slot
from sandmartin.agent.sandbox import Sandbox
from sandmartin.errors import NotFound, ToolFailed
from sandmartin.model import Accel, NetworkPolicy, SandboxSpec, Settings, State
from tests.fakes_agent import IMAGE, Fakes, find_leaks, make_machine, make_spec
from tests.fakes_vmm import SCRATCH
from tests.waiting import until

pytestmark = pytest.mark.qemu_img

READY = f"{IMAGE}=2"


@pytest.fixture
def fakes(directory: Path) -> Fakes:
    return make_machine(directory, warm=True, vm_pool_size=2)


@pytest.fixture
async def host(fakes: Fakes, directory: Path) -> AsyncIterator[Host]:
    async with fakes.host() as host:
        yield host
        await host.terminate()
    assert not _leaks(directory)


def _leaks(directory: Path) -> set[str]:
    """Warm snapshots, and what an agent has of them, stay."""
    kept = ("assets/", "data/bases/", "data/layers/")
    return {name for name in find_leaks(directory) if not name.startswith(kept)}


async def _waiting(host: Host, count: int) -> None:
    await until(lambda: len(host._waiting) == count, f"{count} VMs wait")


async def _ready(host: Host, count: int) -> None:
    await until(lambda: len(host._ready) == count, f"{count} sandboxes are ready")


async def _assert_usable(sandbox: Sandbox) -> None:
    async with aclosing(sandbox.exec(Command(cmd="echo", args=("hi",)))) as events:
        assert Output(b"hi") in [event async for event in events]


async def test_whatever_is_restored_takes_one_that_waits(fakes: Fakes, host: Host) -> None:
    await host.create(make_spec("sb1"), {})
    await host.create(make_spec("sb2"), {})
    await _waiting(host, 2)
    started = fakes.vmm.restored
    third = await host.create(make_spec("sb3"), {})
    assert third.entry.group.startswith("waiting-")
    fakes.vmm.vms["sb3"].write(SCRATCH, b"mine")
    await host.pause("sb3")
    await host.resume("sb3", None)
    assert fakes.vmm.vms["sb3"].read(SCRATCH, 4) == b"mine"
    assert len(await host.fork("sb3", ["child1"], None)) == 1
    for each in host.sandboxes():
        await _assert_usable(each)
    await _waiting(host, 2)
    # Three were taken, the pool is full again, and at most one came too late.
    assert 3 <= fakes.vmm.restored - started <= 4


async def test_one_that_has_died_is_replaced(fakes: Fakes, host: Host) -> None:
    await host.create(make_spec("sb1"), {})
    await _waiting(host, 1)
    for waiting in host._waiting._waiting.values():
        waiting[0].running.record.process.kill()
        assert await waiting[0].running.record.process.gone(5)
    await _assert_usable(await host.create(make_spec("sb2"), {}))


async def test_the_pool_is_mixed_as_the_last_requests_were(fakes: Fakes, host: Host) -> None:
    await host.create(make_spec("sb1"), {})
    await host.create(make_spec("sb2"), {})
    await _waiting(host, 2)
    for number in range(2):
        await host.create(make_spec(f"other{number}", memory_mb=256), {})
    await until(
        lambda: [s.memory_mb for s, _ in host._waiting._waiting] == [256], "the other shape waits"
    )
    await _waiting(host, 2)


async def test_what_waits_ends_with_a_killed_agent(directory: Path) -> None:
    """The next agent finds VMs that are in no journal."""
    fakes = make_machine(directory, warm=True, vm_pool_size=1, ready_sandboxes=READY)
    host = Host(fakes.machine)
    await host.open()
    await host.create(make_spec("sb1"), {})
    await _waiting(host, 1)
    await _ready(host, 2)
    await fakes.machine.tasks.close()
    fakes.machine.data.close()
    async with make_machine(directory).host() as after:
        assert [each.sandbox_id for each in after.sandboxes()] == ["sb1"]
        assert after.get("sb1").state is State.RUNNING
        left = {name for name in find_leaks(directory) if name.startswith("groups/")}
        assert left == {f"groups/{after.get('sb1').entry.group or 'sb1'}"}
        await after.terminate()
    assert not _leaks(directory)


# Ready sandboxes.


@pytest.fixture
async def ready_host(directory: Path) -> AsyncIterator[tuple[Fakes, Host]]:
    fakes = make_machine(directory, warm=True, ready_sandboxes=READY)
    async with fakes.host() as host:
        await _ready(host, 2)
        yield fakes, host
        await host.terminate()
    assert not _leaks(directory)


def _default(sandbox_id: str = "sb1") -> SandboxSpec:
    return SandboxSpec(sandbox_id=sandbox_id, template=IMAGE, timeout_s=9)


async def test_a_create_claims_one_that_is_ready(ready_host: tuple[Fakes, Host]) -> None:
    fakes, host = ready_host
    assert not host.sandboxes()
    started = fakes.vmm.restored
    sandbox = await host.create(_default(), {"A": "b"})
    assert fakes.vmm.restored == started
    assert (sandbox.sandbox_id, sandbox.state) == ("sb1", State.RUNNING)
    assert sandbox.entry.spec == _default()
    identity = fakes.guests.identities[sandbox.host_ip]
    assert (identity.sandbox_id, identity.hostname) == ("sb1", "sb1")
    assert identity.token == sandbox.entry.token
    assert fakes.guests.memory(sandbox.host_ip)["envs"] == {"A": "b"}
    await _assert_usable(sandbox)
    await _ready(host, 2)
    # It is like any other from now on.
    fakes.vmm.vms["sb1"].write(SCRATCH, b"mine")
    await host.pause("sb1")
    await host.resume("sb1", None)
    assert fakes.vmm.vms["sb1"].read(SCRATCH, 4) == b"mine"
    await host.destroy("sb1")
    with pytest.raises(NotFound):
        host.get("sb1")


async def test_a_claim_loads_rules_for_a_policy_alone(
    ready_host: tuple[Fakes, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes, host = ready_host
    loaded: list[NetworkPolicy] = []

    async def apply(slot: Slot, policy: NetworkPolicy) -> None:
        loaded.append(policy)

    monkeypatch.setattr(fakes.network, "apply", apply)
    await host.create(_default("sb1"), {})
    assert not loaded
    narrow = NetworkPolicy(allow_internet_access=False)
    await host.create(replace(_default("sb2"), network=narrow), {})
    assert loaded == [narrow]


async def test_another_shape_is_made_as_ever(ready_host: tuple[Fakes, Host]) -> None:
    fakes, host = ready_host
    sandbox = await host.create(replace(_default(), memory_mb=256), {})
    assert fakes.vmm.specs["sb1"].memory_mb == 256
    assert len(host._ready) == 2
    await _assert_usable(sandbox)


async def test_one_that_does_not_answer_is_no_obstacle(ready_host: tuple[Fakes, Host]) -> None:
    fakes, host = ready_host
    failures = iter([ToolFailed("the guest says no")])

    async def fail_once(_: Identity) -> None:
        for failure in failures:
            raise failure

    fakes.guests.introducing = fail_once
    await _assert_usable(await host.create(_default(), {}))


async def test_creates_at_once_get_one_each(ready_host: tuple[Fakes, Host]) -> None:
    _, host = ready_host
    made = await asyncio.gather(*(host.create(_default(f"sb{i}"), {}) for i in range(5)))
    assert len({each.host_ip for each in made}) == 5
    for each in made:
        await _assert_usable(each)


async def test_they_make_room_for_what_is_asked_for(directory: Path) -> None:
    each = 512 + OVERHEAD_MB[Accel.TCG]
    reserve = memory_total_mb() - 2 * each - 1
    fakes = make_machine(directory, warm=True, ready_sandboxes=READY, memory_reserve_mb=reserve)
    async with fakes.host() as host:
        await _ready(host, 2)
        await host.create(replace(_default(), disk_size_mb=6000), {})
        await _ready(host, 1)
        await host.create(replace(_default("sb2"), disk_size_mb=6000), {})
        await _ready(host, 0)
        await host.terminate()


async def test_they_go_with_their_template(directory: Path) -> None:
    fakes = make_machine(directory, warm=True, ready_sandboxes="frozen=1")
    async with fakes.host() as host:
        await host.create(make_spec("sb1"), {})
        await host.create_snapshot("sb1", "frozen", live=True)
        host._ready._wanted.set()
        await host.destroy("sb1")
        await _ready(host, 1)
        await host.delete_snapshot("frozen")
        assert len(host._ready) == 0
        await host.terminate()


def test_the_setting_is_checked() -> None:
    assert Settings(ready_sandboxes="base=2, other=1").ready == {"base": 2, "other": 1}
    for wrong in ("base", "base=x", "../x=1", "base=-1"):
        with pytest.raises(Exception, match=r"ready_sandboxes|template name"):
            Settings(ready_sandboxes=wrong)
