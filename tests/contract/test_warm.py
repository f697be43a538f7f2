"""Warm snapshots of a machine: their disk budget, who may remove what, shapes, making ahead.

Two agents of one machine are two data directories over one assets directory, in one process: a
lock of a file is between descriptors, so it keeps them apart as it does two processes.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sandmartin.agent import proc
from sandmartin.agent.disk import allocated_bytes
from sandmartin.agent.guest import Identity
from sandmartin.agent.host import Host
from sandmartin.agent.images import ext4_bytes
from sandmartin.agent.machine import Machine
from sandmartin.agent.snapshots import Signer, Snapshots
from sandmartin.agent.warm import WarmStore
from sandmartin.model import DEFAULT_DISK_SIZE_MB, Shape, State, WarmAhead
from tests.fakes_agent import (
    IMAGE,
    IMAGE_MB,
    Fakes,
    find_leaks,
    make_machine,
    make_spec,
)
from tests.fakes_vmm import PLATFORM, SCRATCH
from tests.waiting import until

pytestmark = pytest.mark.qemu_img

SMALL, LARGE = Shape(vcpus=1, memory_mb=128), Shape(vcpus=1, memory_mb=256)
MARK = b"remember this"
DAY_S = 86400.0


@pytest.fixture
def beside(directory: Path) -> Path:
    """Of a second agent, which has assets and images in common with the first."""
    path = directory / "beside"
    (path / "data" / "images").mkdir(parents=True)
    (path / "data").chmod(0o711)
    path.chmod(0o711)
    (path / "assets").symlink_to(directory / "assets")
    (path / "data" / "images" / IMAGE).symlink_to(directory / "data" / "images" / IMAGE)
    return path


def warm(directory: Path) -> list[Path]:
    """The warm snapshots of the machine."""
    return list((directory / "assets/warm").glob("[!.]*"))


def warm_as(shape: Shape, directory: Path) -> Path:
    """The only one of its shape."""
    sizes = {path: (path / "base.ram").stat().st_size for path in warm(directory)}
    (found,) = (path for path, size in sizes.items() if size == shape.memory_mb << 20)
    return found


def adopted(directory: Path) -> set[str]:
    """What an agent has of warm snapshots: a layer of each. Bases of fake VMs are often alike."""
    return {path.stem for path in (directory / "data/layers").iterdir()}


async def create(host: Host, sandbox_id: str, shape: Shape = SMALL) -> None:
    sandbox = await host.create(make_spec(sandbox_id, memory_mb=shape.memory_mb), {})
    assert sandbox.state is State.RUNNING


async def create_and_destroy(host: Host, shape: Shape = SMALL) -> None:
    await create(host, "sbpassing", shape)
    await host.destroy("sbpassing")


def counts(fakes: Fakes) -> tuple[int, int]:
    return fakes.vmm.booted, fakes.vmm.restored


# The budget.


@pytest.fixture
def store(directory: Path) -> WarmStore:
    return _store(directory, budget_bytes=3 << 20)


def _store(directory: Path, budget_bytes: int) -> WarmStore:
    (directory / "assets").mkdir(exist_ok=True)
    snapshots = Snapshots(Signer.open(directory / "assets/platform.key"))
    return WarmStore(directory / "assets/warm", budget_bytes, snapshots, PLATFORM)


def _put(directory: Path, number: int, age_s: float) -> Path:
    """Something that takes 1 MiB and that an agent used so long ago."""
    path = directory / "assets/warm" / f"{number:020x}"
    path.mkdir(parents=True)
    (path / "base.ram").write_bytes(os.urandom(1 << 20))
    with (path / "base.ram").open("r+b") as file:
        file.truncate(1 << 30)
    path.with_name(f".{path.name}.lock").touch()
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_least_recently_used_go_first(directory: Path, store: WarmStore) -> None:
    # Their order is neither that of their names nor that in which they were made.
    paths = [_put(directory, n, age_s) for n, age_s in enumerate((40, 20, 50, 10, 30))]
    store.trim()
    assert [path.exists() for path in paths] == [False, True, False, True, True]
    # Of what is gone nothing is left, no lock either.
    assert len(list((directory / "assets/warm").iterdir())) == 6
    store.trim()
    assert len(warm(directory)) == 3


def test_file_counts_once(directory: Path, store: WarmStore) -> None:
    paths = [_put(directory, n, 10.0 * n) for n in range(3)]
    # As an agent has it in its data directory, and as two warm snapshots might share it.
    (directory / "elsewhere").hardlink_to(paths[2] / "base.ram")
    for n in range(3):
        (paths[n] / "shared").hardlink_to(paths[2] / "base.ram")
    store.trim()
    assert len(warm(directory)) == 3
    (paths[0] / "one more").write_bytes(b"x")
    for n in range(3):
        os.utime(paths[n], (time.time() - 10 * n,) * 2)
    store.trim()
    # The oldest frees nothing, because others have its file too: the next one goes as well.
    assert warm(directory) == [paths[0]]
    assert allocated_bytes(directory / "elsewhere") == 1 << 20


@pytest.mark.parametrize("how", [fcntl.LOCK_SH, fcntl.LOCK_EX])
def test_what_is_in_use_stays(directory: Path, how: int) -> None:
    store = _store(directory, budget_bytes=0)
    used, unused = _put(directory, 1, 30 * DAY_S), _put(directory, 2, 30 * DAY_S)
    draft = used.with_name(f".{used.name}.abcdef")
    draft.mkdir()
    with used.with_name(f".{used.name}.lock").open("a") as lock:
        fcntl.flock(lock, how)
        store.tidy()
        assert (used.exists(), draft.exists(), unused.exists()) == (True, True, False)
    store.tidy()
    assert list((directory / "assets/warm").iterdir()) == []


async def test_evicted_is_made_anew_and_what_was_made_from_it_lives(directory: Path) -> None:
    fakes = make_machine(directory, warm=True, warm_budget_mb=0)
    async with fakes.host() as host:
        await create(host, "sb1")
        fakes.vmm.vms["sb1"].write(SCRATCH, MARK)
        (small,) = warm(directory)
        await create_and_destroy(host, LARGE)
        assert small not in warm(directory)
        assert len(warm(directory)) == 1
        # Its files are those of the sandbox still.
        await host.pause("sb1")
        await host.resume("sb1", None)
        assert fakes.vmm.vms["sb1"].read(SCRATCH, len(MARK)) == MARK
        assert len(adopted(directory)) == 2
        await host.destroy("sb1")
        # Nothing needs the agent's own names of them any more.
        assert len(adopted(directory)) == 1
        booted = fakes.vmm.booted
        await create_and_destroy(host)
        assert fakes.vmm.booted == booted + 1
        assert warm(directory) == [small]
        await host.terminate()


async def test_use_keeps_it_from_being_evicted(directory: Path) -> None:
    fakes = make_machine(directory, warm=True)
    async with fakes.host() as host:
        for shape in (SMALL, LARGE):
            await create_and_destroy(host, shape)
        small = warm_as(SMALL, directory)
        for path in warm(directory):
            os.utime(path, (time.time() - 3600 * (1 + (path == small)),) * 2)
        await create_and_destroy(host)
        await host.terminate()
    _store(directory, budget_bytes=_taken(small)).trim()
    assert warm(directory) == [small]


def _taken(path: Path) -> int:
    return sum(allocated_bytes(file) for file in path.rglob("*") if file.is_file())


# Agents.


async def test_who_made_it_may_be_gone(directory: Path, beside: Path) -> None:
    first, second = make_machine(directory, warm=True), make_machine(beside, warm=True)
    second = replace(second, machine=_of_one_machine(second, first))
    async with second.host() as two:
        await create_and_destroy(two)
    # It called the image so.
    (beside / "data" / "images" / IMAGE).unlink()
    async with first.host() as one:
        await create_and_destroy(one)
    assert (counts(second), counts(first)) == ((1, 1), (0, 1))


async def test_agents_share_and_never_take_away_what_is_restored(
    directory: Path, beside: Path
) -> None:
    first, second = make_machine(directory, warm=True), make_machine(beside, warm=True)
    second = replace(second, machine=_of_one_machine(second, first, warm_budget_mb=0))
    arrived, may_go_on = asyncio.Event(), asyncio.Event()

    async def wait(identity: Identity) -> None:
        if identity.sandbox_id == "sbslow":
            arrived.set()
            await may_go_on.wait()

    first.guests.introducing = wait
    async with first.host() as one, second.host() as two:
        await create_and_destroy(one)
        await create_and_destroy(two)
        assert (counts(first), counts(second)) == ((1, 1), (0, 1))
        slow = asyncio.create_task(create(one, "sbslow"))
        await arrived.wait()
        await create_and_destroy(two, LARGE)
        # Beyond the second one's budget, and kept by the first one's create.
        assert len(warm(directory)) == 2
        may_go_on.set()
        await slow
        await create_and_destroy(two, Shape(memory_mb=384))
        assert len(warm(directory)) == 1
        # It was removed by another agent: made anew here, and taken by the other one then.
        await create_and_destroy(one)
        assert first.vmm.booted == 2
        booted = second.vmm.booted
        await create_and_destroy(two)
        assert second.vmm.booted == booted
        # Under the name that it knows another one stands now.
        found = warm_as(SMALL, directory)
        shutil.rmtree(found)
        await create_and_destroy(one)
        (layer,) = found.glob("*.qcow2")
        assert layer.stem not in adopted(beside)
        await create_and_destroy(two)
        assert second.vmm.booted == booted
        assert layer.stem in adopted(beside)
        for host in (one, two):
            await host.terminate()


def _of_one_machine(fakes: Fakes, other: Fakes, **settings: int) -> Machine:
    """With the kernel of the other agent, as all on one machine have."""
    changed = replace(fakes.machine.settings, **settings)  # type: ignore[arg-type]
    kernel, initramfs = other.machine.kernel, other.machine.initramfs
    return replace(fakes.machine, settings=changed, kernel=kernel, initramfs=initramfs)


async def test_start_tidies_up_after_others(directory: Path) -> None:
    async with make_machine(directory, warm=True).host() as host:
        await create_and_destroy(host)
        await host.terminate()
    (made,) = warm(directory)
    place = made.parent
    draft, left, foreign = place / f".{made.name}.abcdef", place / f".{'a' * 20}.lock", place / "x"
    draft.mkdir()
    (draft / "base.ram").write_bytes(b"half of it")
    for path in (left, foreign):
        path.touch()
    other = replace(PLATFORM, vmm_version="fake 2")
    for age_s, stays in ((6 * DAY_S, True), (8 * DAY_S, False)):
        os.utime(made, (time.time() - age_s,) * 2)
        # What runs here stays, however old.
        async with make_machine(directory, warm=True).host():
            await until(lambda: not left.exists() and not draft.exists(), "drafts are removed")
        assert made.exists() and foreign.exists()
        draft.mkdir()
        left.touch()
        async with make_machine(directory, platform=other).host():
            await until(lambda: not left.exists() and not draft.exists(), "drafts are removed")
        assert made.exists() is stays
        draft.mkdir()
        left.touch()


async def test_image_made_anew_again_and_again_leaves_one_snapshot(directory: Path) -> None:
    fakes = make_machine(directory, warm=True)
    image = directory / "data/images" / IMAGE / "rootfs.ext4"
    async with fakes.host() as host:
        await create(host, "sbfirst")
        for number in range(7):
            os.utime(image, (number, number))
            await create_and_destroy(host)
        assert fakes.vmm.booted == 8
        # Those of the last creates, and that of the sandbox.
        assert 2 < len(adopted(directory)) <= 5
        for _ in range(4):
            await create_and_destroy(host)
        assert fakes.vmm.booted == 8
        assert len(adopted(directory)) == 2
        await host.destroy("sbfirst")
        assert len(adopted(directory)) == 1
        # Each shape has one of its own.
        await create_and_destroy(host, LARGE)
        assert len(adopted(directory)) == 2
        await host.terminate()


@pytest.fixture
def far_assets(directory: Path) -> Iterator[Path]:
    """Assets on another file system, from where files are not linked but copied."""
    with tempfile.TemporaryDirectory(prefix="sandmartin-", dir="/dev/shm") as path:
        (directory / "assets").symlink_to(path)
        yield Path(path)


async def test_sweep_in_the_middle_takes_nothing_away(directory: Path, far_assets: Path) -> None:
    async with make_machine(directory, warm=True).host() as host:
        await create_and_destroy(host)
        await host.terminate()
    assert len(list(far_assets.glob("warm/*/base.ram"))) == 1
    for path in (*directory.glob("data/bases/*"), *directory.glob("data/layers/*")):
        path.unlink()
    fakes = make_machine(directory, warm=True)
    async with fakes.host() as host:
        creating = asyncio.create_task(create(host, "sb1"))
        while not creating.done():
            # As each destroy does.
            await fakes.machine.storage.sweep(host._needed)
            await asyncio.sleep(0)
        await creating
        assert counts(fakes) == (0, 1)
        await host.terminate()


# Shapes, and making ahead.


async def test_shape_outside_the_list_boots(directory: Path) -> None:
    fakes = make_machine(directory, warm=True, warm_shapes=(SMALL,))
    async with fakes.host() as host:
        await create_and_destroy(host, LARGE)
        assert counts(fakes) == (1, 0)
        await create_and_destroy(host, SMALL)
        assert counts(fakes) == (2, 1)
        await create_and_destroy(host, LARGE)
        assert counts(fakes) == (3, 1)
        assert len(warm(directory)) == 1
        await host.terminate()


async def test_made_ahead_before_anyone_asks(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ahead = (
        WarmAhead(template="absent", shape=SMALL),
        WarmAhead(template=IMAGE, shape=LARGE),
        WarmAhead(template=IMAGE, shape=SMALL),
    )
    fakes = make_machine(directory, warm=True, warm_shapes=(SMALL,), warm_ahead=ahead)
    async with fakes.host() as host:
        await until(lambda: bool(warm(directory)), "one is made")
        await create_and_destroy(host)
        assert counts(fakes) == (1, 1)
        assert "template absent is not made warm ahead" in caplog.text
        assert f"template {IMAGE} is not made warm ahead: the settings" in caplog.text
        await host.terminate()


async def test_made_ahead_once_with_who_asks_meanwhile_and_ended_with_the_agent(
    directory: Path,
) -> None:
    ahead = tuple(WarmAhead(template=IMAGE, shape=Shape(memory_mb=mb)) for mb in (128, 256, 384))
    fakes = make_machine(directory, warm=True, warm_ahead=ahead)
    async with fakes.host() as host:
        await until(lambda: fakes.vmm.booted == 1, "the first is being made")
        await asyncio.gather(*(create(host, f"sb{n}") for n in range(3)))
        assert fakes.vmm.booted <= 2
        await host.close()
        # It begins with no other one when it is to end.
        made = fakes.vmm.booted
        await asyncio.sleep(0)
        assert fakes.vmm.booted == made < 3
    second = make_machine(directory, warm=True)
    async with second.host() as host:
        await host.terminate()
    left = {name.rpartition("/")[2] for name in find_leaks(directory)}
    assert not {name for name in left if name.startswith(".")}


# Images that are grown.


@pytest.mark.root
async def test_image_is_grown_at_the_start_once_nothing_depends_on_it(directory: Path) -> None:
    image = directory / "data/images/small/rootfs.ext4"
    spec = replace(make_spec(), template="small", disk_size_mb=IMAGE_MB)
    async with make_machine(directory).host() as host:
        image.parent.mkdir()
        with image.open("wb") as file:
            file.truncate(IMAGE_MB << 20)
        await proc.run(["mke2fs", "-q", "-F", "-t", "ext4", image])
        await host.create(spec, {})
        await host.create_snapshot("sb1", "frozen", live=True)
    async with make_machine(directory).host() as host:
        assert ext4_bytes(image) == IMAGE_MB << 20
        await host.destroy("sb1")
    async with make_machine(directory).host() as host:
        # The template is enough.
        assert ext4_bytes(image) == IMAGE_MB << 20
        await host.delete_snapshot("frozen")
    async with make_machine(directory).host() as host:
        assert ext4_bytes(image) == DEFAULT_DISK_SIZE_MB << 20
        small = next(each for each in host.templates() if each.path == image)
        assert small.size_mb == DEFAULT_DISK_SIZE_MB  # type: ignore[union-attr]
        sandbox = await host.create(replace(spec, disk_size_mb=DEFAULT_DISK_SIZE_MB), {})
        assert sandbox.state is State.RUNNING
        await host.terminate()
