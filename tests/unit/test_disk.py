"""Images by name, and what is refused before anything is made. Layers are tested with the VMs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sandmartin.agent.disk import (
    Image,
    ImageStore,
    allocated_bytes,
    check_free,
    check_layer,
    check_size,
    holds_data,
    publish,
)
from sandmartin.agent.proc import run
from sandmartin.errors import Exhausted, Invalid, NotFound, ToolFailed


def _image(path: Path, size_bytes: int) -> Path:
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


def test_own_images_come_before_the_built_in_ones(tmp_path: Path) -> None:
    built_in = {
        "base": _image(tmp_path / "assets" / "base.ext4", 1 << 20),
        "other": _image(tmp_path / "assets2" / "other.ext4", 1 << 20),
    }
    own = _image(tmp_path / "images" / "base" / "rootfs.ext4", (2 << 20) + 1)
    # A directory without an image is one that is being made.
    (tmp_path / "images" / "unfinished").mkdir()
    store = ImageStore(tmp_path / "images", built_in)
    assert store.names() == ["base", "other"]
    assert store.get("base") == Image("base", own)
    # Rounded up, so that no layer is smaller than its image.
    assert store.get("base").size_mb == 3
    assert store.get("other").path == built_in["other"]
    for name in ("unfinished", "absent"):
        with pytest.raises(NotFound, match=name) as caught:
            store.get(name)
        assert caught.value.hint.endswith("base, other")


def test_disk_below_its_image_is_refused(tmp_path: Path) -> None:
    image = Image("base", _image(tmp_path / "images" / "rootfs.ext4", 8 << 20))
    check_size(image, 8)
    with pytest.raises(Invalid, match="disk_size_mb is 7") as caught:
        check_size(image, 7)
    assert caught.value.hint == "use 8 or more"


@pytest.mark.qemu_img
async def test_layer_that_was_written_to_is_told_from_an_empty_one(tmp_path: Path) -> None:
    layer = tmp_path / "layer.qcow2"
    assert not holds_data(layer)
    await run(["qemu-img", "create", "-q", "-f", "qcow2", layer, "5G"])
    assert not holds_data(layer)
    # To the disk's last cluster, which the last entry of the table is for.
    last = str((5 << 30) - 65536)
    await run(["qemu-io", "-f", "qcow2", "-c", f"write -q {last} 64k", layer])
    assert holds_data(layer)
    content = layer.read_bytes()
    # What a power cut may leave, and what a guest may have made of it.
    for damaged in (b"", content[:40], content[:64], content[:40] + b"\xff" * 8 + content[48:]):
        layer.write_bytes(damaged)
        assert not holds_data(layer)


def _header(*, magic: bytes = b"QFI\xfb", version: int = 3, features: int = 0) -> bytes:
    return magic + version.to_bytes(4, "big") + bytes(64) + features.to_bytes(8, "big")


def test_layer_is_taken_that_names_no_other_file(tmp_path: Path) -> None:
    layer = tmp_path / "layer-one.qcow2"
    for features in (0, 0b1, 0b10, 0b11011):
        layer.write_bytes(_header(features=features))
        check_layer(layer)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        _header()[:-1],
        _header(magic=b"QED\0"),
        _header(version=2),
        # Its data is in a file that the header names.
        _header(features=0b100),
        _header(features=1 << 63),
    ],
)
def test_layer_with_a_forged_header_is_refused(tmp_path: Path, header: bytes) -> None:
    layer = tmp_path / "layer-one.qcow2"
    layer.write_bytes(header)
    with pytest.raises(Invalid, match="layer-one"):
        check_layer(layer)


def test_what_is_no_file_of_its_own_becomes_no_image(tmp_path: Path) -> None:
    # A program that parses what guests wrote, and was misled, leaves something in its place.
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    secret.chmod(0o600)
    target = tmp_path / "new" / "rootfs.ext4"
    target.parent.mkdir()
    found = tmp_path / "found"
    leaves: list[Callable[[], None]] = [
        lambda: found.symlink_to(secret),
        lambda: found.hardlink_to(secret),
        lambda: os.mkfifo(found),
        lambda: found.mkdir(),
    ]
    for leave in leaves:
        leave()
        with pytest.raises(ToolFailed, match="image new was not made"):
            publish(found, target)
        if found.is_dir():
            found.rmdir()
        else:
            found.unlink()
    assert secret.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ToolFailed, match="No such file"):
        publish(found, target)
    assert list(target.parent.iterdir()) == []


def test_floor_of_free_space(tmp_path: Path) -> None:
    check_free(tmp_path, 0)
    with pytest.raises(Exhausted, match="below the floor of 1099511627776 MB"):
        check_free(tmp_path, 2**40)


def test_allocated_is_what_a_sparse_file_takes(tmp_path: Path) -> None:
    path = _image(tmp_path / "sparse" / "file", 64 << 20)
    assert allocated_bytes(path) == 0
    path.write_bytes(b"x" * 4096)
    assert allocated_bytes(path) >= 4096
