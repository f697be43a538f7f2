"""What a sandbox is held to: its network policy and its idle limit, through all of its life."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sandmartin.agent.host import Host
from sandmartin.agent.journal import DataDir
from sandmartin.agent.sandbox import Sandbox
from sandmartin.agent.snapshots import Manifest
from sandmartin.errors import Conflict, DiskFull, NotFound, ToolFailed
from sandmartin.model import INTERNET, NetworkPolicy, State
from tests.fakes_agent import IMAGE, Fakes, make_machine, make_spec
from tests.waiting import until

pytestmark = pytest.mark.qemu_img

POLICY = NetworkPolicy(deny_out=("0.0.0.0/0",), allow_out=("*.example.com", "203.0.113.7"))
OTHER = NetworkPolicy(allow_internet_access=False)


def rules(fakes: Fakes, sandbox: Sandbox) -> NetworkPolicy:
    """What the rules of a sandbox's slot are; it is what the journal says, too."""
    slot = sandbox.entry.slot
    assert slot is not None
    entry = dict(DataDir(fakes.data.path).read_all())[sandbox.sandbox_id]
    assert entry is not None and entry.network == sandbox.entry.network
    found = fakes.network.policy(fakes.network._slot(slot))
    assert found == sandbox.entry.network
    return found


async def test_the_rules_are_there_before_the_guest_runs(directory: Path) -> None:
    seen: list[tuple[str, NetworkPolicy]] = []

    def note(step: str) -> None:
        if step in {"vmm:started", "fork:loaded", "resume:loaded", "create:loaded"}:
            network = made.network
            newest = max(int(each.name) for each in network._directory.iterdir())
            seen.append((step, network.policy(network._slot(newest))))

    made = make_machine(directory, step=note)
    async with made.host() as host:
        sandbox = await host.create(make_spec(network=POLICY), {})
        await host.pause("sb1")
        await host.resume("sb1", None)
        assert rules(made, sandbox) == POLICY
        (child,) = await host.fork("sb1", ["child"], None)
        assert isinstance(child, Sandbox) and rules(made, child) == POLICY
    assert {step for step, _ in seen} == {"vmm:started", "resume:loaded", "create:loaded"}
    assert {policy for _, policy in seen} == {POLICY}


async def test_a_policy_is_replaced_whole(fakes: Fakes, host: Host) -> None:
    sandbox = await host.create(make_spec(), {})
    assert rules(fakes, sandbox) == INTERNET
    for policy in (POLICY, OTHER, INTERNET):
        await host.update_network("sb1", policy)
        assert rules(fakes, sandbox) == policy
    await host.update_network("sb1", POLICY)
    fakes.network.failure = ToolFailed("nft exited 1")
    with pytest.raises(ToolFailed):
        await host.update_network("sb1", OTHER)
    assert rules(fakes, sandbox) == POLICY
    fakes.network.failure = None
    fakes.data.full = True
    with pytest.raises(DiskFull):
        await host.update_network("sb1", OTHER)
    fakes.data.full = False
    assert rules(fakes, sandbox) == POLICY


async def test_a_paused_one_has_it_when_it_wakes(fakes: Fakes, host: Host) -> None:
    sandbox = await host.create(make_spec(network=POLICY), {})
    checkpoint = await host.checkpoint("sb1", "")
    await host.pause("sb1")
    await host.update_network("sb1", OTHER)
    await host.resume("sb1", None)
    assert rules(fakes, sandbox) == OTHER
    # A checkpoint is of memory and disk, not of what is allowed.
    await host.rollback("sb1", checkpoint.path.name)
    assert rules(fakes, sandbox) == OTHER


async def test_a_template_has_that_of_its_source(fakes: Fakes, host: Host) -> None:
    await host.create(make_spec(network=POLICY), {})
    snapshot = await host.create_snapshot("sb1", "made", live=True)
    assert snapshot.manifest.network == POLICY
    for asked, has in ((None, POLICY), (OTHER, OTHER), (INTERNET, INTERNET)):
        spec = make_spec("sb2", network=asked)
        sandbox = await host.create(type(spec)(**vars(spec) | {"template": "made"}), {})
        assert rules(fakes, sandbox) == has
        await host.destroy("sb2")
    # One of the first release has none.
    raw = json.loads(snapshot.manifest.to_json())
    del raw["network"]
    assert Manifest.from_json(json.dumps(raw).encode()).network == INTERNET


async def test_a_ready_one_has_it_before_it_is_handed_out(directory: Path) -> None:
    fakes = make_machine(directory, ready_sandboxes=f"{IMAGE}=1")
    async with fakes.host() as host:
        await until(lambda: len(host._ready) == 1, "one is ready")
        spec = make_spec(memory_mb=512, disk_size_mb=5120, network=POLICY)
        started = fakes.vmm.booted
        sandbox = await host.create(spec, {})
        assert fakes.vmm.booted == started and rules(fakes, sandbox) == POLICY
        await host.terminate()


async def test_the_next_agent_keeps_both(directory: Path) -> None:
    fakes = make_machine(directory)
    async with fakes.host() as host:
        await host.create(make_spec(timeout_s=900), {})
        await host.update_network("sb1", POLICY)
        await host.set_timeout("sb1", 700)
    fakes = make_machine(directory)
    # As if the agent had ended between its record and the rules.
    (slot,) = (int(each.name) for each in fakes.network._directory.iterdir())
    await fakes.network.apply(fakes.network._slot(slot), INTERNET)
    async with fakes.host() as host:
        sandbox = host.get("sb1")
        assert rules(fakes, sandbox) == POLICY
        assert sandbox.entry.spec.timeout_s == 700


async def test_an_idle_limit_is_changed_while_it_runs(host: Host) -> None:
    sandbox = await host.create(make_spec(timeout_s=900), {})
    await host.set_timeout("sb1", 1)
    # From now on, not from its last activity.
    assert sandbox.idle_s < 1
    await until(lambda: sandbox.state is State.PAUSED, "the reaper")
    await host.set_timeout("sb1", 0)
    await host.resume("sb1", None)
    assert sandbox.entry.spec.timeout_s == 0 and not sandbox.idles()


async def test_of_what_is_not_there_nothing_is_changed(fakes: Fakes, host: Host) -> None:
    with pytest.raises(NotFound):
        await host.update_network("none", POLICY)
    with pytest.raises(NotFound):
        await host.set_timeout("none", 1)
    sandbox = await host.create(make_spec(), {})
    fakes.vmm.vms["sb1"].record.process.kill()
    await until(lambda: sandbox.state is State.ERROR, "its end is seen")
    for change in (host.update_network("sb1", POLICY), host.set_timeout("sb1", 1)):
        with pytest.raises(Conflict):
            await change
