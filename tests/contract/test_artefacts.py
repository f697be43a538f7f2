"""Templates into an artefact store and out of it: one suite on a folder and on a real S3 server."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from sandmartin.agent import stored
from sandmartin.agent.disk import Image
from sandmartin.agent.host import Host
from sandmartin.agent.snapshots import Signer
from sandmartin.agent.stored import Place, Progress, Pushed
from sandmartin.artefacts import chunks, manifest
from sandmartin.artefacts.chunks import CHUNK_BYTES
from sandmartin.artefacts.manifest import Manifest, Part
from sandmartin.artefacts.store import Store
from sandmartin.errors import (
    AlreadyExists,
    Conflict,
    Denied,
    DiskFull,
    Exhausted,
    Invalid,
    NotFound,
    Unavailable,
)
from sandmartin.model import Accel, State
from sandmartin.transport import Artefact, ArtefactStore, NewSandbox
from sandmartin.transport.agent import AgentSocket
from tests.contract.stores import KINDS, TestStore, store_of
from tests.contract.test_contents import gnu_tar, make_disk, sent
from tests.control.agent_process import dying_agent
from tests.control.conftest import running_host
from tests.fakes_agent import IMAGE, Fakes, find_leaks, machine_directory, make_machine, make_spec
from tests.fakes_vmm import PLATFORM, SCRATCH
from tests.waiting import until

pytestmark = pytest.mark.qemu_img

MARK = b"remember this"
KEY = bytes(range(32))


@pytest.fixture(params=KINDS)
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TestStore]:
    with store_of(request.param, tmp_path) as kept:
        yield kept


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[TestStore]:
    with store_of("folder", tmp_path) as kept:
        yield kept


def place_of(kept: TestStore, key: bytes = KEY) -> Place:
    return Place(kept.open(), Signer(key))


async def pushed(host: Host, name: str, place: Place) -> Pushed:
    async with aclosing(host.push_template(name, place)) as events:
        *before, last = [each async for each in events]
    assert all(isinstance(each, Progress) for each in before)
    assert isinstance(last, Pushed)
    return last


async def snapshot_on(host: Host, fakes: Fakes, name: str = "marked") -> None:
    await host.create(make_spec(), {"A": "1"})
    fakes.vmm.vms["sb1"].write(SCRATCH, MARK)
    await host.create_snapshot("sb1", name, live=False)


@contextlib.asynccontextmanager
async def another(**options: object) -> AsyncIterator[tuple[Host, Fakes, Path]]:
    """A host with a key of its own, on another directory."""
    with machine_directory() as directory:
        fakes = make_machine(directory, **options)  # type: ignore[arg-type]
        async with fakes.host() as host:
            yield host, fakes, directory


# Objects.


async def test_objects_of_a_store(kept: TestStore) -> None:
    store = kept.open()
    assert not await store.has("chunks/a")
    with pytest.raises(NotFound):
        await store.get("chunks/a", 10)
    await store.put("chunks/a", b"one")
    await store.put("chunks/a", b"two")
    await store.put("chunks/b/c", b"")
    await store.put("other/d", b"three")
    assert await store.has("chunks/a") and await store.get("chunks/a", 3) == b"two"
    with pytest.raises(Invalid, match="larger"):
        await store.get("chunks/a", 2)
    found = [each async for each in store.list("chunks/")]
    assert sorted((each.name, each.size_bytes) for each in found) == [
        ("chunks/a", 3),
        ("chunks/b/c", 0),
    ]
    assert all(each.modified_at > 1e9 for each in found)
    await store.delete(["chunks/a", "chunks/gone", "chunks/b/c"])
    assert [each async for each in store.list("chunks/")] == []
    assert await store.has("other/d")


@pytest.mark.s3
async def test_a_server_that_is_away_or_refuses_is_told_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store_of("s3", tmp_path) as kept:
        assert kept.server is not None
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
        with pytest.raises(Denied) as refused:
            await kept.open().put("chunks/a", b"x")
        monkeypatch.undo()
        store = kept.open()
        kept.server.kill()
        with pytest.raises(Unavailable) as away:
            await store.has("chunks/a")
        kept.server.start()
        assert not await store.has("chunks/a")
    for raised in (refused, away):
        told = f"{raised.value.message} {raised.value.hint}"
        assert "not-the-secret" not in told and kept.server.secret_key not in told


@pytest.mark.parametrize(
    "url",
    ["", "store", "file://host/x", "http://x/y", "s3://", "s3://k:secret@b/x", "s3://b?k=secret"],
)
def test_urls_that_are_none_are_refused_without_being_told(url: str) -> None:
    with pytest.raises(Invalid) as refused:
        Store.open(url)
    assert "secret" not in refused.value.message


# There and back.


async def test_a_snapshot_goes_on_at_another_host(kept: TestStore) -> None:
    place = place_of(kept)
    async with another() as (host, fakes, _):
        await snapshot_on(host, fakes)
        first = await pushed(host, "marked", place)
        assert 0 < first.added_bytes < first.size_bytes
        # Again, nothing is sent, and it is the same.
        again = await pushed(host, "marked", place)
        assert again == replace(first, added_bytes=0)
        await host.destroy("sb1")
    async with another() as (there, others, directory):
        await there.fetch_template("back", first.artefact_id, place)
        with pytest.raises(AlreadyExists):
            await there.fetch_template("back", first.artefact_id, place)
        await there.create(replace(make_spec("sb2"), template="back"), {})
        assert others.vmm.vms["sb2"].read(SCRATCH, len(MARK)) == MARK
        await there.destroy("sb2")
        await there.delete_snapshot("back")
        assert not find_leaks(directory)


async def test_what_two_templates_share_is_there_once_and_holes_are_not(
    kept: TestStore, tmp_path: Path
) -> None:
    place = place_of(kept)
    image = make_disk(tmp_path / "rootfs.ext4", 1024)
    fill(image, {40: os.urandom(CHUNK_BYTES), 700: os.urandom(CHUNK_BYTES)})
    async with another() as (host, _, _):
        await host.write_template("one", sent(gnu_tar(tmp_path, image.name)))
        first = await pushed(host, "one", place)
        assert 2 * CHUNK_BYTES < first.added_bytes < 4 * CHUNK_BYTES
        fill(image, {300: b"another" * 1000})
        await host.write_template("two", sent(gnu_tar(tmp_path, image.name)))
        second = await pushed(host, "two", place)
        assert second.artefact_id != first.artefact_id
        assert second.added_bytes < 64 << 10
    async with another() as (there, _, directory):
        await there.fetch_template("two", second.artefact_id, place)
        made = directory / "data/images/two/rootfs.ext4"
        assert made.read_bytes() == image.read_bytes()
        assert made.stat().st_blocks * 512 <= image.stat().st_blocks * 512 + CHUNK_BYTES
        assert made.stat().st_mode & 0o777 == 0o444
        assert "two" in [each.name for each in there.templates() if isinstance(each, Image)]


def fill(path: Path, content: dict[int, bytes]) -> None:
    with path.open("r+b") as file:
        for number, data in content.items():
            file.seek(number * CHUNK_BYTES)
            file.write(data)


async def test_orders_of_a_platform_come_over_the_wire(kept: TestStore) -> None:
    store = ArtefactStore(url=kept.url, key=KEY)
    assert "key" not in repr(store)
    async with (
        running_host() as host,
        aclosing(AgentSocket(host.fakes.machine.settings.socket)) as transport,
    ):
        new = NewSandbox(sandbox_id="sb1", template=IMAGE, memory_mb=128, disk_size_mb=8)
        await transport.create(new)
        await transport.create_snapshot("sb1", "marked", live=True)
        async with aclosing(transport.push_template("marked", store)) as events:
            made = [each async for each in events][-1]
        assert isinstance(made, Artefact)
        await transport.fetch_template("back", made.artefact_id, store)
        with pytest.raises(AlreadyExists):
            await transport.fetch_template("back", made.artefact_id, store)
        with pytest.raises(NotFound):
            async with aclosing(transport.push_template("nothing", store)) as events:
                await anext(events)
        with pytest.raises(Invalid, match="its key"):
            await transport.fetch_template("x", made.artefact_id, replace(store, key=b"short"))


# What is refused, and what is left of it.


@pytest.fixture
async def artefact(folder: TestStore) -> Pushed:
    """A snapshot in a folder, whose host is gone."""
    async with another() as (host, fakes, _):
        await snapshot_on(host, fakes)
        made = await pushed(host, "marked", place_of(folder))
        await host.destroy("sb1")
    return made


async def refused(
    error: type[Exception], artefact_id: str, place: Place, **options: object
) -> Exception:
    """The error with which another host refuses an artefact, of which nothing is left."""
    async with another(**options) as (there, _, directory):
        with pytest.raises(error) as raised:
            await there.fetch_template("bad", artefact_id, place)
        assert not find_leaks(directory)
        with pytest.raises(NotFound):
            await there.create(replace(make_spec(), template="bad"), {})
    return raised.value


async def test_a_chunk_that_is_damaged_is_found_and_stored_anew(folder: TestStore) -> None:
    place = place_of(folder)
    async with another() as (host, fakes, _):
        await snapshot_on(host, fakes)
        made = await pushed(host, "marked", place)
        for path in folder.files("chunks")[::2]:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
            error = await refused(Invalid, made.artefact_id, place)
            assert path.name[:12] in str(error)
            assert not path.exists()
            # The next who has it puts it there, and that alone.
            again = await pushed(host, "marked", place)
            assert again.artefact_id == made.artefact_id
            assert path.stat().st_size == again.added_bytes > 0
    async with another() as (there, fakes, _):
        await there.fetch_template("back", made.artefact_id, place)
        await there.create(replace(make_spec("sb2"), template="back"), {})
        assert fakes.vmm.vms["sb2"].read(SCRATCH, len(MARK)) == MARK


async def test_what_is_not_whole_or_not_the_platforms_is_refused(
    folder: TestStore, artefact: Pushed
) -> None:
    place = place_of(folder)
    await refused(Invalid, "0" * 64, place)
    await refused(Invalid, "../../etc/passwd", place)
    await refused(Invalid, artefact.artefact_id, place_of(folder, bytes(32)))
    (path,) = folder.files("artefacts")
    content = path.read_bytes()
    for damaged in (content[:-10], b"", chunks.pack(b"{}"), chunks.pack(bytes(1000))):
        path.write_bytes(damaged)
        await refused(Invalid, artefact.artefact_id, place)
    path.write_bytes(content)
    for each in folder.files("chunks")[:2]:
        each.unlink()
    error = await refused(Invalid, artefact.artefact_id, place)
    assert "is not in the artefact store" in str(error)


def _odd_name(parts: dict[str, Part]) -> None:
    parts["../../escape"] = parts["state"]


def _no_manifest(parts: dict[str, Part]) -> None:
    del parts["manifest.json"]


def _no_memory(parts: dict[str, Part]) -> None:
    del parts["ram.base"]


def _other_length(parts: dict[str, Part]) -> None:
    parts["state"] = replace(parts["state"], size_bytes=parts["state"].size_bytes + 1)


def _huge_state(parts: dict[str, Part]) -> None:
    parts["state"] = replace(parts["state"], size_bytes=1 << 40)


def _other_memory(parts: dict[str, Part]) -> None:
    parts["ram.base"] = replace(parts["ram.base"], size_bytes=64 << 20)


def _other_diff(parts: dict[str, Part]) -> None:
    parts["ram.diff"] = parts["state"]


@pytest.mark.parametrize(
    "change",
    [
        _odd_name,
        _no_manifest,
        _no_memory,
        _other_length,
        _huge_state,
        _other_memory,
        _other_diff,
    ],
)
async def test_a_platforms_own_artefact_is_still_looked_at(
    folder: TestStore, artefact: Pushed, change: Callable[[dict[str, Part]], None]
) -> None:
    place = place_of(folder)
    parts = dict((await manifest.read(place.store, artefact.artefact_id)).parts)
    change(parts)
    made = Manifest(parts)
    made = Manifest(parts, place.signer.sign(made.signed))
    await refused(Invalid, await manifest.write(place.store, made), place)


@pytest.mark.parametrize(
    "raw",
    [
        b"[]",
        b"{}",
        b'{"format": 2}',
        b'{"format": 1, "parts": [], "signature": ""}',
        b'{"format": 1, "parts": {"state": {"size_bytes": -1, "chunks": []}}, "signature": ""}',
        b'{"format": 1, "parts": {"state": {"size_bytes": 9, "chunks": [[0, "x"]]}},'
        b'"signature": ""}',
        b'{"format": 1, "parts": {"state": {"size_bytes": 9, "chunks": [[true, "%s"]]}},'
        b'"signature": ""}' % (b"0" * 64),
        b'{"format": 1, "parts": {"state": {"size_bytes": 9, "chunks": [[1, "%s"]]}},'
        b'"signature": ""}' % (b"0" * 64),
        b"[" * 100_000,
    ],
)
def test_manifests_that_cannot_be_are_refused(raw: bytes) -> None:
    with pytest.raises(Invalid):
        Manifest.from_json(raw)


def test_what_says_that_it_is_long_takes_no_memory() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    assert len(bomb) < 10_000
    with pytest.raises(Invalid, match="longer"):
        chunks.unpack(bomb, CHUNK_BYTES)
    with pytest.raises(Invalid):
        chunks.unpack(b"none", CHUNK_BYTES)


async def test_what_does_not_run_here_is_refused_before_it_is_fetched(
    folder: TestStore, artefact: Pushed, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in (
        replace(PLATFORM, vmm_version="99"),
        replace(PLATFORM, accel=Accel.KVM),
        replace(PLATFORM, tsc_khz=PLATFORM.tsc_khz + 10_000),
    ):
        monkeypatch.setattr(stored, "_fill", None)
        await refused(Conflict, artefact.artefact_id, place_of(folder), platform=other)


async def test_a_full_disk_leaves_nothing(
    folder: TestStore, artefact: Pushed, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_of(folder)
    await refused(Exhausted, artefact.artefact_id, place, disk_floor_mb=1 << 40)

    def write_at(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sandmartin.agent.memory.base.write_at", write_at)
        await refused(DiskFull, artefact.artefact_id, place)


async def test_who_comes_meanwhile_waits_and_it_ends_when_nobody_does(
    kept: TestStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_of(kept)
    async with another() as (host, fakes, _):
        await snapshot_on(host, fakes)
        made = await pushed(host, "marked", place)
        await host.destroy("sb1")
    going, asked = asyncio.Event(), 0
    get = chunks.get

    async def slow(store: Store, digest: str) -> bytes:
        nonlocal asked
        asked += 1
        await going.wait()
        return await get(store, digest)

    monkeypatch.setattr(chunks, "get", slow)
    async with another() as (there, _, directory):
        fetches = [
            asyncio.ensure_future(there.fetch_template("back", made.artefact_id, place))
            for _ in range(3)
        ]
        await until(lambda: asked > 0, "a chunk that is asked for")
        with pytest.raises(Conflict):
            await there.fetch_template("back", "0" * 64, place)
        fetches[0].cancel()
        await asyncio.wait({fetches[0]})
        assert not fetches[1].done() and asked == 1
        for each in fetches[1:]:
            each.cancel()
        await asyncio.wait(fetches)
        assert not find_leaks(directory)
        going.set()
        again = [there.fetch_template("back", made.artefact_id, place) for _ in range(3)]
        await asyncio.gather(*again)
        assert asked <= 2 + made.size_bytes // CHUNK_BYTES + 40


@pytest.mark.s3
async def test_a_store_that_dies_on_the_way_leaves_nothing_and_the_rest_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandmartin.artefacts.store._MAX_RETRIES", 0)
    with store_of("s3", tmp_path) as kept:
        server, place = kept.server, place_of(kept)
        assert server is not None
        image = make_disk(tmp_path / "rootfs.ext4", 256)
        fill(image, {number: os.urandom(CHUNK_BYTES) for number in range(60, 100)})
        put, count = Store.put, 0

        async def dying(self: Store, name: str, content: bytes) -> None:
            nonlocal count
            count += 1
            if count == 20:
                server.kill()
            await put(self, name, content)

        async with another() as (host, _, _):
            await host.write_template("disk", sent(gnu_tar(tmp_path, image.name)))
            with monkeypatch.context() as patch:
                patch.setattr(Store, "put", dying)
                with pytest.raises(Unavailable):
                    await pushed(host, "disk", place)
            server.start()
            assert kept.files("artefacts") == []
            sent_before = sum(path.stat().st_size for path in kept.files("chunks"))
            assert sent_before > 4 * CHUNK_BYTES
            made = await pushed(host, "disk", place)
            whole = sum(path.stat().st_size for path in kept.files("chunks"))
            assert made.added_bytes <= whole - sent_before
        get, asked = chunks.get, 0

        async def losing(store: Store, digest: str) -> bytes:
            nonlocal asked
            asked += 1
            if asked == 20:
                server.kill()
            return await get(store, digest)

        with monkeypatch.context() as patch:
            patch.setattr(chunks, "get", losing)
            await refused(Unavailable, made.artefact_id, place)
        server.start()
        async with another() as (there, _, directory):
            await there.fetch_template("disk", made.artefact_id, place)
            assert (directory / "data/images/disk/rootfs.ext4").read_bytes() == image.read_bytes()


@pytest.mark.parametrize("step", ["stored:received", "content:sealed"])
async def test_an_agent_that_is_killed_leaves_nothing(
    folder: TestStore, artefact: Pushed, step: str
) -> None:
    store = ArtefactStore(url=folder.url, key=KEY)
    with machine_directory() as elsewhere:
        async with dying_agent(elsewhere, step) as process:
            async with aclosing(AgentSocket(elsewhere / "data/agent.sock")) as transport:
                with pytest.raises(Unavailable):
                    await transport.fetch_template("half", artefact.artefact_id, store)
            await process.wait()
        fakes = make_machine(elsewhere)
        async with fakes.host() as there:
            assert not find_leaks(elsewhere)
            await there.fetch_template("whole", artefact.artefact_id, place_of(folder))
            await there.create(replace(make_spec(), template="whole"), {})
            assert fakes.vmm.vms["sb1"].read(SCRATCH, len(MARK)) == MARK
            await there.terminate()


# Sandboxes that sleep.


async def slept(host: Host, fakes: Fakes, place: Place) -> Pushed:
    """A paused sandbox with a mark in memory, stored."""
    await host.create(make_spec(), {"A": "1"})
    fakes.vmm.vms["sb1"].write(SCRATCH, MARK)
    await host.pause("sb1")
    async with aclosing(host.push_sandbox("sb1", place)) as events:
        *_, last = [each async for each in events]
    assert isinstance(last, Pushed)
    return last


async def test_a_paused_sandbox_goes_on_at_another_host(kept: TestStore) -> None:
    place = place_of(kept)
    async with another() as (host, fakes, directory), another() as (there, others, elsewhere):
        made = await slept(host, fakes, place)
        await there.fetch_template("moved", made.artefact_id, place)
        for _ in range(2):
            await there.adopt_sandbox("sb1", "moved", IMAGE)
        # Both have it asleep: whose it is, is not theirs to say.
        assert (host.get("sb1").state, there.get("sb1").state) == (State.PAUSED, State.PAUSED)
        await host.destroy("sb1")
        assert not find_leaks(directory)
        woken = await there.resume("sb1", 7)
        assert others.vmm.vms["sb1"].read(SCRATCH, len(MARK)) == MARK
        assert woken.entry.spec.template == IMAGE and woken.entry.spec.timeout_s == 7
        known = others.guests.memory(woken.host_ip)
        assert known["id"] == "sb1" and known["envs"] == {"A": "1"}
        assert others.guests.identities[woken.host_ip].moved
        # It sleeps and wakes as any other, and needs the image that came along.
        await there.pause("sb1")
        with pytest.raises(Conflict, match="sb1"):
            await there.delete_snapshot("moved")
        with pytest.raises(AlreadyExists):
            await there.resume("sb1", None)
            await there.adopt_sandbox("sb1", "moved", IMAGE)
        await there.destroy("sb1")
        await there.delete_snapshot("moved")
        assert not find_leaks(elsewhere)


async def test_what_does_not_sleep_on_or_has_checkpoints_is_not_stored(
    folder: TestStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_of(folder)
    async with another() as (host, _, _):
        await host.create(make_spec(), {})
        with pytest.raises(Conflict, match="running"):
            host.push_sandbox("sb1", place)
        await host.pause("sb1")
        add = chunks.add

        async def woken(store: Store, content: bytes) -> tuple[str, int]:
            if host.get("sb1").state is State.PAUSED:
                await host.resume("sb1", None)
                await host.pause("sb1")
            return await add(store, content)

        with monkeypatch.context() as patch:
            patch.setattr(chunks, "add", woken)
            with pytest.raises(Conflict):
                async with aclosing(host.push_sandbox("sb1", place)) as events:
                    async for _ in events:
                        pass
        assert folder.files("artefacts") == []
        await host.resume("sb1", None)
        await host.checkpoint("sb1", "")
        await host.pause("sb1")
        with pytest.raises(Conflict, match="checkpoints"):
            host.push_sandbox("sb1", place)


@pytest.mark.parametrize("step", ["adopt:written", "adopt:paused"])
async def test_an_agent_that_is_killed_has_a_whole_sandbox_or_none(
    folder: TestStore, step: str
) -> None:
    store = ArtefactStore(url=folder.url, key=KEY)
    async with another() as (host, fakes, _):
        made = await slept(host, fakes, place_of(folder))
        await host.destroy("sb1")
    with machine_directory() as elsewhere:
        async with dying_agent(elsewhere, step) as process:
            async with aclosing(AgentSocket(elsewhere / "data/agent.sock")) as transport:
                await transport.fetch_template("moved", made.artefact_id, store)
                with pytest.raises(Unavailable):
                    await transport.adopt_sandbox("sb1", "moved", IMAGE)
            await process.wait()
        fakes = make_machine(elsewhere)
        async with fakes.host() as there:
            assert len(there.sandboxes()) == (step == "adopt:paused")
            await there.adopt_sandbox("sb1", "moved", IMAGE)
            await there.resume("sb1", None)
            assert fakes.vmm.vms["sb1"].read(SCRATCH, len(MARK)) == MARK
            await there.terminate()
            await there.delete_snapshot("moved")
        assert not find_leaks(elsewhere)
