"""The asset store: its formats, and entries that are whole or not there."""

from __future__ import annotations

import asyncio
import fcntl
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sandmartin.agent import assets, packages
from sandmartin.agent.assets import Assets, Member, archive, module_order
from sandmartin.errors import Invalid, NotFound, ToolFailed
from sandmartin.model import Settings


@pytest.fixture
def store() -> Iterator[Path]:
    """A directory that every user can pass through, as an asset store has to be."""
    with tempfile.TemporaryDirectory(prefix="sandmartin-test-") as directory:
        Path(directory).chmod(0o711)
        yield Path(directory) / "store"


def _silent(line: str) -> None:
    pass


def test_archive_is_padded_and_repeatable() -> None:
    members = [
        Member("modules", stat.S_IFDIR | 0o755),
        Member("modules/order", stat.S_IFREG | 0o644, b"virtio.ko\n"),
        Member("init", stat.S_IFREG | 0o755, b"x" * 1027),
    ]
    content = b"".join(archive(members))
    assert content == b"".join(archive(members))
    assert content.startswith(b"070701")
    assert len(content) % 4 == 0
    assert b"TRAILER!!!" in content[-64:]
    assert content.index(b"virtio.ko\n") > content.index(b"modules/order")


def test_modules_follow_what_they_need() -> None:
    depends = (
        "drivers/virtio_ring.ko:\n"
        "drivers/virtio.ko: drivers/virtio_ring.ko\n"
        "net/virtio-net.ko.xz: net/failover.ko drivers/virtio.ko drivers/virtio_ring.ko\n"
        "net/failover.ko:\n"
    )
    assert module_order(depends, ["virtio_net", "built_in"]) == [
        "drivers/virtio_ring.ko",
        "drivers/virtio.ko",
        "net/failover.ko",
        "net/virtio-net.ko.xz",
    ]


def test_what_is_not_built_is_not_found(store: Path) -> None:
    with pytest.raises(NotFound, match=f"is not in {store}") as caught:
        Assets.find(replace(Settings(), assets_dir=store))
    assert "setup" in caught.value.hint


def test_other_images_than_base_are_found_once_they_are_built(store: Path) -> None:
    built = [assets._kernel(), assets._initramfs(), assets._image("base")]
    for name in built:
        (store / name).mkdir(parents=True)
    settings = replace(Settings(), assets_dir=store)
    assert "code-interpreter-v1" not in Assets.find(settings).images
    image = store / assets._image("code-interpreter-v1") / "rootfs.ext4"
    image.parent.mkdir()
    image.touch()
    assert Assets.find(settings).images["code-interpreter-v1"] == image


def test_an_image_stands_on_base_unless_it_says_otherwise() -> None:
    assert assets._chain("base") == ["base"]
    assert assets._chain("python311") == ["base", "python311"]
    assert assets._chain("minimal") == ["minimal"]


async def test_all_asks_for_every_image(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    for name in (assets._kernel(), assets._guest(), assets._initramfs()):
        (store / name).mkdir(parents=True)
    for name in assets.built_in_images():
        (store / assets._image(name)).mkdir()
    monkeypatch.setattr(packages, "find_missing", lambda: [])
    await assets.setup(replace(Settings(), assets_dir=store), lines.append, [assets.ALL])
    for name in ("base", "code-interpreter-v1", "minimal", "node", "python311"):
        assert f"{assets._image(name)}: present" in lines


async def test_only_what_there_is_a_recipe_of_can_be_built(store: Path) -> None:
    settings = replace(Settings(), assets_dir=store)
    with pytest.raises(NotFound, match="'absent'") as caught:
        await assets.setup(settings, _silent, ["base", "absent"])
    assert "code-interpreter-v1" in caught.value.hint
    assert not store.exists()


async def test_an_entry_is_whole_or_not_there(store: Path) -> None:
    store.mkdir()
    lines: list[str] = []

    async def fail(into: Path) -> None:
        (into / "half").touch()
        raise ToolFailed("no")

    async def build(into: Path) -> None:
        (into / "whole").touch()

    with pytest.raises(ToolFailed):
        await assets._ensure(store, "kind-one", fail, lines.append)
    assert list(store.iterdir()) == []
    await assets._ensure(store, "kind-one", build, lines.append)
    await assets._ensure(store, "kind-one", fail, lines.append)
    assert lines[-1] == "kind-one: present"
    (entry,) = store.iterdir()
    assert [path.name for path in entry.iterdir()] == ["whole"]
    # The VMs' users read what is in it.
    assert entry.stat().st_mode & 0o777 == 0o755


async def test_one_setup_at_a_time_and_none_leaves_rubbish(store: Path) -> None:
    store.mkdir()
    entered = asyncio.Event()
    lines: list[str] = []

    async def enter() -> None:
        async with assets._locked(store, lines.append):
            entered.set()

    with (store / "lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        entering = asyncio.ensure_future(enter())
        await asyncio.sleep(0)
        assert lines == [f"waiting for another setup to end in {store}"]
        assert not entered.is_set()
    await asyncio.wait_for(entering, 5)
    # What a setup that was killed left; an entry and the lock stay.
    (store / ".base-0a1b2c.xyz" / "root").mkdir(parents=True)
    (store / "base-0a1b2c").mkdir()
    assets._remove_unfinished(store)
    assert sorted(path.name for path in store.iterdir()) == ["base-0a1b2c", "lock"]


async def test_store_that_vms_cannot_reach_is_refused(store: Path) -> None:
    store.mkdir(mode=0o700)
    with pytest.raises(Invalid, match=f"{store} is closed to other users"):
        async with assets._locked(store / "deep", _silent):
            pass
