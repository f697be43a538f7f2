"""Folding on VMs that are processes with a RAM of their own, and on real layers.

What is folded must be the same to the byte afterwards, whoever comes between, and wherever the
agent dies: each agent that dies is a process of its own, killed at a step.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from sandmartin.agent import proc
from sandmartin.agent.disk import Layers
from sandmartin.agent.folding import DEPTH
from sandmartin.agent.host import Host
from sandmartin.agent.memory import PAGE
from sandmartin.agent.sandbox import Sandbox
from sandmartin.agent.snapshots import Manifest, Snapshot
from sandmartin.errors import Invalid, SandmartinError, ToolFailed
from sandmartin.model import State
from tests.contract.test_host_crash import Killer
from tests.fakes_agent import (
    HASTE,
    IMAGE,
    Fakes,
    find_leaks,
    make_machine,
    make_spec,
)
from tests.fakes_vmm import IDENTITY, SCRATCH
from tests.waiting import until

pytestmark = pytest.mark.qemu_img

ONE, OTHER, TEMPLATE = "sb1", "sb2", "frozen"
MARK = b"remember this"
#: Above a quarter of the RAM of 128 MB.
LARGE = 33 << 20
SOON = replace(HASTE, fold_s=0.01)
#: Owner of sealed layers; far from those of any agent.
_LAYERS_UID = 2_980_001
_KIB = 1 << 10
_DEADLINE_S = 60


class Steps:
    """What is done at a step, once; and the steps that were come by."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.then: dict[str, Callable[[], Awaitable[object]]] = {}
        self.done: list[asyncio.Future[object]] = []

    def __call__(self, step: str) -> None:
        self.seen.append(step)
        if (work := self.then.pop(step, None)) is not None:
            self.done.append(asyncio.ensure_future(work()))

    async def results(self) -> list[object]:
        return await asyncio.gather(*self.done)


@pytest.fixture
def steps() -> Steps:
    return Steps()


@pytest.fixture
def fakes(directory: Path, steps: Steps) -> Fakes:
    return make_machine(directory, step=steps, patience=SOON)


def make_large(fakes: Fakes, name: str = ONE) -> None:
    """Dirty much of a guest's RAM, with something else in every page, and zeroes in between."""
    pages = (i.to_bytes(8, "little") * (PAGE // 8) for i in range(LARGE // PAGE))
    content = bytearray(b"".join(pages))
    content[1 << 20 : 2 << 20] = bytes(1 << 20)
    fakes.vmm.vms[name].write(SCRATCH + 1, bytes(content))
    fakes.vmm.vms[name].write(SCRATCH, MARK)


def ram(fakes: Fakes, name: str = ONE) -> str:
    """Checksum of a guest's RAM but for the page that says who it is."""
    content = bytearray(fakes.vmm.vms[name].read(0, 128 << 20))
    content[IDENTITY * PAGE : (IDENTITY + 1) * PAGE] = bytes(PAGE)
    return hashlib.sha256(content).hexdigest()


def paused(fakes: Fakes, name: str = ONE) -> Snapshot:
    return fakes.machine.storage.snapshots.read(fakes.data.sandbox(name).paused)


def template(fakes: Fakes) -> Snapshot:
    return fakes.machine.storage.snapshots.read(fakes.data.templates / TEMPLATE)


async def folded(fakes: Fakes, find: Callable[[Fakes], Snapshot]) -> Manifest:
    """The manifest of a snapshot once it has no diff any more, and what was has gone."""
    await until(lambda: find(fakes).manifest.diff is None, "the fold")
    await until(lambda: not find(fakes).diff.exists(), "the end of the old diff")
    return find(fakes).manifest


def bases(fakes: Fakes) -> set[str]:
    """Those that hold anything."""
    there = (path for path in fakes.data.bases.iterdir() if path.stat().st_blocks)
    return {path.name.removesuffix(".ram") for path in there}


# RAM.


async def test_large_memory_of_a_pause_becomes_a_base(
    fakes: Fakes, host: Host, directory: Path
) -> None:
    for name in (ONE, OTHER):
        await host.create(make_spec(name), {})
    make_large(fakes)
    before = ram(fakes)
    await host.pause(OTHER)
    await host.pause(ONE)
    old = paused(fakes).manifest
    new = await folded(fakes, paused)
    assert (new.size_bytes, new.state, new.token) == (old.size_bytes, old.state, old.token)
    assert new.base != old.base
    # A small one is not worth it.
    assert paused(fakes, OTHER).manifest.diff is not None
    await host.resume(ONE, None)
    assert ram(fakes) == before
    await host.pause(ONE)
    again = paused(fakes).manifest
    assert (again.base, again.diff is not None) == (new.base, True)
    assert again.size_bytes < old.size_bytes // 50
    await host.resume(ONE, None)
    assert ram(fakes) == before
    await host.destroy(ONE)
    assert bases(fakes) == set()
    await host.destroy(OTHER)
    assert not find_leaks(directory)


async def test_large_checkpoint_is_folded_and_one_that_is_returned_to_often(
    fakes: Fakes, host: Host
) -> None:
    sandbox = await host.create(make_spec(), {})
    small = (await host.checkpoint(ONE, "")).path.name
    make_large(fakes)
    large = (await host.checkpoint(ONE, "")).path.name
    before = ram(fakes)
    await folded(fakes, lambda _: sandbox.get_checkpoint(large))
    assert sandbox.get_checkpoint(small).manifest.diff is not None
    for _ in range(3):
        await host.rollback(ONE, small)
    await folded(fakes, lambda _: sandbox.get_checkpoint(small))
    await host.rollback(ONE, small)
    assert fakes.vmm.vms[ONE].read(SCRATCH, len(MARK)) == bytes(len(MARK))
    await host.rollback(ONE, large)
    assert ram(fakes) == before


async def test_who_starts_from_a_template_while_it_is_folded_gets_all_of_it(
    steps: Steps, directory: Path
) -> None:
    first = make_machine(directory)
    async with first.host() as host:
        await host.create(make_spec(), {})
        make_large(first)
        before = ram(first)
        await host.create_snapshot(ONE, TEMPLATE, live=True)
    fakes = make_machine(directory, step=steps, patience=SOON)
    spec = replace(make_spec(), template=TEMPLATE)
    async with fakes.host() as host:
        # The first has read the old manifest when it is replaced, and, as it is the first of this
        # agent, makes an empty layer before it reads the diff.
        for number, step in enumerate(("fold:base", "fold:replaced", "fold:dropped")):
            child = replace(spec, sandbox_id=f"sb1{number}")
            steps.then[step] = partial(host.create, child, {})
        await folded(fakes, template)
        await until(lambda: len(steps.done) == 3, "the children")
        origins = [child.entry.ram for child in await steps.results() if isinstance(child, Sandbox)]
        new = template(fakes).manifest.base
        assert [origin is not None and origin.base == new for origin in origins] == [
            *(False, True, True)
        ]
        assert {ram(fakes, f"sb1{number}") for number in range(3)} == {before}
        for sandbox in host.sandboxes():
            await host.destroy(sandbox.sandbox_id)
        await host.delete_snapshot(TEMPLATE)
        assert not find_leaks(directory)


async def test_template_that_is_removed_while_it_is_folded_is_gone(
    fakes: Fakes, host: Host, steps: Steps, directory: Path
) -> None:
    async def remove() -> None:
        await host.destroy(ONE)
        await host.delete_snapshot(TEMPLATE)

    await host.create(make_spec(), {})
    steps.then["fold:base"] = remove
    await host.create_snapshot(ONE, TEMPLATE, live=True)
    await until(lambda: bool(steps.done), "the fold")
    await steps.results()
    await until(lambda: not find_leaks(directory), "the end of all of it")


@pytest.mark.parametrize("then", ["resume", "destroy", "rollback"])
@pytest.mark.parametrize("step", ["fold:began", "fold:base"])
async def test_fold_that_comes_too_late_is_dropped(
    fakes: Fakes, host: Host, steps: Steps, directory: Path, step: str, then: str
) -> None:
    sandbox = await host.create(make_spec(), {})
    first = (await host.checkpoint(ONE, "")).path.name
    make_large(fakes)
    before = ram(fakes)
    # At the sandbox itself: it has the lock when the fold comes to take over.
    steps.then[step] = {
        "resume": lambda: sandbox.resume(),
        "destroy": lambda: sandbox.destroy(),
        "rollback": lambda: sandbox.rollback(first),
    }[then]
    await host.pause(ONE)
    await until(lambda: bool(steps.done), "the fold")
    await steps.results()
    named = {sandbox.entry.ram.base} if sandbox.entry.ram else set()
    await until(lambda: bases(fakes) <= named, "the end of what nobody needs")
    assert "fold:replaced" not in steps.seen
    if then == "destroy":
        await host.destroy(ONE)
        assert not find_leaks(directory)
        return
    assert sandbox.state is State.RUNNING
    mark = fakes.vmm.vms[ONE].read(SCRATCH, len(MARK))
    assert mark == (MARK if then == "resume" else bytes(len(MARK)))
    if then == "resume":
        assert ram(fakes) == before


async def test_nothing_is_folded_while_the_host_is_busy(
    fakes: Fakes, host: Host, steps: Steps
) -> None:
    async def slowly(_: object) -> None:
        for _ in range(300):
            await asyncio.sleep(0.001)

    await host.create(make_spec(), {})
    make_large(fakes)
    fakes.guests.introducing = slowly
    creating = asyncio.ensure_future(host.create(make_spec(OTHER), {}))
    await asyncio.sleep(0)
    await host.pause(ONE)
    await creating
    await folded(fakes, paused)
    assert steps.seen.index("create:running") < steps.seen.index("fold:base")


async def test_damaged_base_is_not_made_a_new_one(
    fakes: Fakes, host: Host, steps: Steps, caplog: pytest.LogCaptureFixture
) -> None:
    await host.create(make_spec(), {})
    await host.create_snapshot(ONE, TEMPLATE, live=True)
    base = fakes.data.bases / f"{(await folded(fakes, template)).base}.ram"
    await host.create(replace(make_spec(OTHER), template=TEMPLATE), {})
    make_large(fakes, OTHER)
    with base.open("rb+") as file:
        file.write(b"damaged")
    await host.pause(OTHER)
    await until(lambda: "is damaged" in caplog.text, "the refusal")
    assert paused(fakes, OTHER).manifest.diff is not None
    assert steps.seen.count("fold:base") == 1


# Disk.


class Content:
    """What a disk must hold, written to a sandbox's top layer as its VM would."""

    def __init__(self, fakes: Fakes) -> None:
        self._fakes = fakes
        self.expected = bytearray(image(fakes).read_bytes())

    async def write(self, sandbox: Sandbox, number: int) -> None:
        """Something new, and less than a cluster and zeroes over what was."""
        changes = [(number, number * 32 * _KIB, 48 * _KIB), (number, 4 * _KIB * number, 4 * _KIB)]
        changes += [(0, number * 128 * _KIB, 64 * _KIB)] if number else [(77, 4 << 20, 7 << 19)]
        commands = []
        for pattern, at, size in changes:
            write = f"write -P {pattern}" if pattern else "write -z"
            commands += ["-c", f"{write} {at} {size}"]
            self.expected[at : at + size] = bytes([pattern]) * size
        sealed = [self._fakes.machine.storage.layers.path(each) for each in sandbox.entry.layers]
        node: dict[str, object] = {"driver": "raw", "file": _file(image(self._fakes), True)}
        for path in sealed:
            node = {"driver": "qcow2", "file": _file(path, True), "backing": node}
        top = self._fakes.data.sandbox(sandbox.sandbox_id).layer(sandbox.entry.top)
        node = {"driver": "qcow2", "file": _file(top, False), "backing": node}
        await proc.run(["qemu-io", *commands, "json:" + json.dumps(node)])


def _file(path: Path, read_only: bool) -> dict[str, object]:
    return {"driver": "file", "filename": os.fspath(path), "read-only": read_only}


def image(fakes: Fakes) -> Path:
    return fakes.data.images / IMAGE / "rootfs.ext4"


async def disk(fakes: Fakes, layers: tuple[str, ...]) -> bytes:
    """What a chain shows, by the program that makes images of chains."""
    path = fakes.data.path.parent / "flat" / "rootfs.ext4"
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    await fakes.machine.storage.layers.flatten(image(fakes), layers, path)
    return path.read_bytes()


def layer_files(fakes: Fakes) -> set[str]:
    return {path.stem for path in fakes.data.layers.iterdir()}


async def deepen(host: Host, fakes: Fakes, content: Content, count: int) -> dict[str, bytes]:
    """Checkpoints with something new on disk before each; what the disk of each holds."""
    sandbox, held = host.get(ONE), {}
    for _ in range(count):
        await content.write(sandbox, len(sandbox.checkpoints()))
        checkpoint = await host.checkpoint(ONE, "")
        held[checkpoint.path.name] = bytes(content.expected)
    return held


async def shortened(host: Host) -> tuple[str, ...]:
    entry = host.get(ONE).entry
    await until(lambda: len(host.get(ONE).entry.layers) <= DEPTH, f"a merge of {entry.layers}")
    return host.get(ONE).entry.layers


@pytest.mark.root
async def test_long_chain_of_one_that_runs_is_merged_under_it(
    fakes: Fakes, host: Host, steps: Steps, directory: Path
) -> None:
    sandbox, content = await host.create(make_spec(), {}), Content(fakes)
    held = await deepen(host, fakes, content, DEPTH)
    full = sandbox.entry.layers
    held |= await deepen(host, fakes, content, 1)
    layers = await shortened(host)
    await until(lambda: "fold:relinked" in steps.seen, "the VM's new chain")
    assert fakes.vmm.vms[ONE].sealed == list(layers)
    # The lowest holds more than the others together: it is not copied again.
    assert (layers[0], layers[-1] in full, len(layers)) == (full[0], False, 4)
    assert await disk(fakes, layers) == content.expected
    held |= await deepen(host, fakes, content, 9)
    await shortened(host)
    # What is named is left alone, and still shows what it did.
    for checkpoint in sandbox.checkpoints():
        shown = await disk(fakes, checkpoint.manifest.layers)
        assert shown == held[checkpoint.path.name]
    first, *others = [checkpoint.path.name for checkpoint in sandbox.checkpoints()]
    for name in others:
        await host.delete_checkpoint(ONE, name)
    layers = await shortened(host)
    assert await disk(fakes, layers) == content.expected
    await until(lambda: layer_files(fakes) == set(layers), "the end of the merged ones")
    await host.rollback(ONE, first)
    assert await disk(fakes, sandbox.entry.layers) == held[first]
    await host.destroy(ONE)
    assert not find_leaks(directory)


@pytest.mark.root
async def test_fork_and_rollback_in_the_middle_of_a_merge(
    fakes: Fakes, host: Host, steps: Steps, directory: Path
) -> None:
    sandbox, content = await host.create(make_spec(), {}), Content(fakes)
    steps.then["fold:began"] = lambda: host.fork(ONE, [OTHER], None)
    await deepen(host, fakes, content, DEPTH + 1)
    layers = await shortened(host)
    await until(lambda: bool(steps.done), "the fork")
    await steps.results()
    await until(lambda: len(host.get(OTHER).entry.layers) <= DEPTH, "the child's merge")
    await until(lambda: steps.seen.count("fold:relinked") == 2, "both VMs' new chains")
    for each in (sandbox, host.get(OTHER)):
        assert await disk(fakes, each.entry.layers) == content.expected
        assert fakes.vmm.vms[each.sandbox_id].sealed == list(each.entry.layers)
    # What was merged once serves both.
    assert set(layers) & set(host.get(OTHER).entry.layers) > {layers[0]}
    first = sandbox.checkpoints()[0]
    expected = await disk(fakes, first.manifest.layers)
    steps.then["fold:began"] = lambda: host.rollback(ONE, first.path.name)
    await deepen(host, fakes, content, DEPTH + 1 - len(layers))
    await until(lambda: len(steps.done) == 2, "the rollback")
    await steps.results()
    assert sandbox.entry.layers == first.manifest.layers
    assert await disk(fakes, sandbox.entry.layers) == expected
    await host.terminate()
    assert not find_leaks(directory)


@pytest.mark.root
@pytest.mark.parametrize("asleep", [False, True])
async def test_next_agent_merges_what_it_finds(directory: Path, asleep: bool) -> None:
    first = make_machine(directory)
    async with first.host() as host:
        await host.create(make_spec(), {})
        content = Content(first)
        await deepen(host, first, content, DEPTH + 3)
        if asleep:
            await host.pause(ONE)
    second = make_machine(directory, patience=SOON)
    async with second.host() as host:
        layers = await shortened(host)
        if asleep:
            await until(lambda: paused(second).manifest.layers == layers, "its manifest")
            await host.resume(ONE, None)
        await until(lambda: second.vmm.vms[ONE].sealed == list(layers), "the VM's new chain")
        assert await disk(second, layers) == content.expected
        await host.terminate()
    assert not find_leaks(directory)


@pytest.mark.root
async def test_merge_that_cannot_be_recorded_or_taken_over_loses_nothing(
    fakes: Fakes, host: Host, steps: Steps, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def fill() -> None:
        fakes.data.full = True

    sandbox, content = await host.create(make_spec(), {}), Content(fakes)
    # In the same breath as the step.
    steps.then["fold:merged"] = fill
    await deepen(host, fakes, content, DEPTH + 1)
    full = sandbox.entry.layers
    await until(lambda: "stays as it is" in caplog.text, "the failure")
    await until(lambda: layer_files(fakes) == set(full), "the end of what was merged in vain")
    assert (sandbox.entry.layers, fakes.vmm.vms[ONE].sealed) == (full, list(full))
    fakes.data.full = False
    fakes.vmm.vms[ONE].relink_failure = ToolFailed("the monitor refused")
    await deepen(host, fakes, content, 1)
    layers = await shortened(host)
    await until(lambda: "the monitor refused" in caplog.text, "the refusal")
    # Its VM goes on with what it has, which holds the same, and gets another chain with its next.
    assert len(fakes.vmm.vms[ONE].sealed) == DEPTH + 2
    assert await disk(fakes, layers) == content.expected
    await host.pause(ONE)
    await host.resume(ONE, None)
    assert fakes.vmm.vms[ONE].sealed == list(layers)
    await host.terminate()
    assert not find_leaks(directory)


@pytest.mark.root
@pytest.mark.parametrize("step", ["fold:began", "fold:layer", "fold:merged", "fold:base"])
async def test_agent_that_ends_in_the_middle_of_a_fold_leaves_nothing(
    fakes: Fakes, host: Host, steps: Steps, directory: Path, step: str
) -> None:
    await host.create(make_spec(), {})
    steps.then[step] = host.terminate
    if step in {"fold:layer", "fold:merged"}:
        await deepen(host, fakes, Content(fakes), DEPTH + 1)
    else:
        make_large(fakes)
        await host.pause(ONE)
    await until(lambda: bool(steps.done), "the fold")
    await steps.results()
    assert not find_leaks(directory)


@pytest.mark.root
async def test_merge_believes_no_layer(directory: Path) -> None:
    store, secret = directory / "store", directory / "secret"
    store.mkdir(mode=0o711)
    secret.write_bytes(b"secret" * 30_000)
    image = directory / "image.raw"
    image.write_bytes(bytes(1 << 20))
    layers = Layers(store, _LAYERS_UID)
    names = []
    for pattern in (1, 2, 3):
        top = await layers.create(directory, 2)
        at = f"{pattern * 128}k"
        await proc.run(["qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} {at} 192k", top])
        names.append(layers.seal(top))

    async def pause() -> None:
        pass

    await layers.merge(names, 2, "merged", pause)
    whole, merged = directory / "whole" / "rootfs", directory / "merged" / "rootfs"
    for chain, target in ((names, whole), (["merged"], merged)):
        target.parent.mkdir()
        await layers.flatten(image, chain, target)
    kib = [b"\1" * 128, b"\2" * 128, b"\3" * 192]
    expected = b"".join(pattern * _KIB for pattern in kib)
    assert whole.read_bytes() == merged.read_bytes()
    assert merged.read_bytes() == (bytes(128 * _KIB) + expected).ljust(2 << 20, b"\0")
    status = layers.path("merged").stat()
    assert (status.st_uid, status.st_mode & 0o777) == (_LAYERS_UID, 0o400)
    # What a guest may write into the header of its layer: more and more of it.
    await proc.run(["qemu-img", "rebase", "-u", "-b", secret, "-F", "raw", layers.path(names[2])])
    with pytest.raises(ToolFailed, match="null-co"):
        await layers.merge(names, 2, "other", pause)
    await proc.run(["qemu-img", "resize", layers.path(names[1]), "1T"])
    with pytest.raises(ToolFailed, match="smaller"):
        await layers.merge(names, 2, "other", pause)
    with layers.path(names[0]).open("rb+") as file:
        # Its data is in a file that the header names.
        file.seek(79)
        file.write(b"\4")
    with pytest.raises(Invalid, match="damaged"):
        await layers.merge(names, 2, "other", pause)
    assert {path.name for path in store.iterdir()} == {f"{n}.qcow2" for n in (*names, "merged")}


# Killed.


async def _prepare(kind: str, host: Host, fakes: Fakes) -> None:
    await host.create(make_spec(), {})
    match kind:
        case "pause":
            make_large(fakes)
            await host.pause(ONE)
        case "template":
            make_large(fakes)
            await host.create_snapshot(ONE, TEMPLATE, live=True)
        case "running" | "asleep":
            fakes.vmm.vms[ONE].write(SCRATCH, MARK)
            await deepen(host, fakes, Content(fakes), DEPTH + 2)
            if kind == "asleep":
                await host.pause(ONE)


def _is_folded(kind: str, host: Host, fakes: Fakes) -> bool:
    match kind:
        case "pause":
            return paused(fakes).manifest.diff is None and not paused(fakes).diff.exists()
        case "template":
            return template(fakes).manifest.diff is None and not template(fakes).diff.exists()
        case "asleep":
            layers = host.get(ONE).entry.layers
            return len(layers) <= DEPTH and paused(fakes).manifest.layers == layers
        case _:
            layers = host.get(ONE).entry.layers
            return len(layers) <= DEPTH and fakes.vmm.vms[ONE].sealed == list(layers)


async def _fold(kind: str, directory: Path, killer: Killer) -> None:
    killer.arm()
    fakes = make_machine(directory, step=killer, patience=SOON)
    async with fakes.host() as host:
        await until(lambda: _is_folded(kind, host, fakes), "the fold")


async def _prepare_in(kind: str, directory: Path) -> None:
    fakes = make_machine(directory)
    async with fakes.host() as host:
        await _prepare(kind, host, fakes)


def main() -> None:
    """Play the agents of the cases in argv; how each ended, as JSON."""
    ends = []
    for kind, step, directory in json.loads(sys.argv[1]):
        child = os.fork()
        if child == 0:
            try:
                asyncio.run(_fold(kind, Path(directory), Killer(step)))
            finally:
                os._exit(0)
        ends.append(os.waitpid(child, 0)[1])
    print(json.dumps(ends))


async def _kill(cases: list[tuple[str, str, Path]]) -> None:
    argv = json.dumps([(kind, step, os.fspath(path)) for kind, step, path in cases])
    words = [sys.executable, "-m", "tests.contract.test_folding", argv]
    env = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = await proc.run(words, cwd=Path(__file__).parents[2], env=env, deadline_s=_DEADLINE_S)
    for (kind, step, _), status in zip(cases, json.loads(done.stdout), strict=True):
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed, f"{kind} did not come to {step}: status {status}"


def _assert_whole(host: Host, fakes: Fakes) -> None:
    """All that is named is there, and there is nothing else."""
    sandbox, storage = host.get(ONE), fakes.machine.storage
    kept = [*sandbox.kept_snapshots(), *(t for t in host.templates() if isinstance(t, Snapshot))]
    named_layers, named_bases = set(sandbox.entry.layers), set()
    if sandbox.entry.ram is not None:
        named_bases.add(sandbox.entry.ram.base)
    for snapshot in kept:
        assert snapshot.diff.exists() is (snapshot.manifest.diff is not None)
        named_layers |= set(snapshot.manifest.layers)
        named_bases.add(snapshot.manifest.base)
    asleep = sandbox.asleep_in()
    assert asleep is None or asleep.manifest.layers == sandbox.entry.layers
    assert storage.layers.names() == named_layers
    assert bases(fakes) == named_bases & bases(fakes)
    assert named_bases <= storage.names()
    assert not [path for path in fakes.data.path.rglob(".*") if not path.name.endswith(".lock")]


async def _assert_same(kind: str, host: Host, fakes: Fakes, expected: tuple[str, bytes]) -> None:
    name = ONE
    if kind == "template":
        name = OTHER
        await host.create(replace(make_spec(OTHER), template=TEMPLATE), {})
    await host.resume(ONE, None)
    found = ram(fakes, name), await disk(fakes, host.get(ONE).entry.layers)
    assert found == expected


@pytest.mark.root
@pytest.mark.parametrize("kind", ["pause", "template", "running", "asleep"])
async def test_killed_at_every_step_of_a_fold(kind: str, directory: Path) -> None:
    killer = Killer()
    begin = directory / "begin"
    begin.mkdir(mode=0o711)
    await _prepare_in(kind, begin)
    await _fold(kind, begin, killer)
    steps = [step for step in dict.fromkeys(killer.seen) if step.startswith("fold:")]
    memory = ["fold:began", "fold:base", "fold:replaced", "fold:dropped"]
    layers = ["fold:began", "fold:layer", "fold:merged", "fold:recorded", "fold:relinked"]
    assert steps == (memory if kind in {"pause", "template"} else layers)
    fakes = make_machine(begin)
    async with fakes.host() as host:
        if kind == "template":
            await host.create(replace(make_spec(OTHER), template=TEMPLATE), {})
        await host.resume(ONE, None)
        name = OTHER if kind == "template" else ONE
        expected = ram(fakes, name), await disk(fakes, host.get(ONE).entry.layers)
    cases = [(kind, step, directory / step.replace(":", "-")) for step in steps]
    for _, _, path in cases:
        path.mkdir(mode=0o711)
        await _prepare_in(kind, path)
    await _kill(cases)
    for _, step, path in cases:
        fakes = make_machine(path)
        async with fakes.host() as host:
            _assert_whole(host, fakes)
        # A VM that was not told of its shorter chain has the old one until it is asked again.
        if (kind, step) != ("running", "fold:recorded"):
            await _fold(kind, path, Killer())
        fakes = make_machine(path)
        async with fakes.host() as host:
            _assert_whole(host, fakes)
            await _assert_same(kind, host, fakes, expected)
            with contextlib.suppress(SandmartinError):
                await host.delete_snapshot(TEMPLATE)
            await host.terminate()
            with contextlib.suppress(SandmartinError):
                await host.delete_snapshot(TEMPLATE)
        assert not find_leaks(path), f"after {step}"


if __name__ == "__main__":
    main()
