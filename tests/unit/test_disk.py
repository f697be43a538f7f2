"""Images by name, and what is refused before anything is made. Layers are tested with the VMs."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandmartin.agent.disk import Image, ImageStore, allocated_bytes, check_free, create_layer
from sandmartin.errors import Exhausted, Invalid, NotFound


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


async def test_layer_below_its_image_is_refused(tmp_path: Path) -> None:
    image = Image("base", _image(tmp_path / "images" / "rootfs.ext4", 8 << 20))
    with pytest.raises(Invalid, match="disk_size_mb is 7") as caught:
        await create_layer(image, tmp_path / "layer", 7, 1)
    assert caught.value.hint == "use 8 or more"
    assert allocated_bytes(tmp_path / "layer") == 0


def test_floor_of_free_space(tmp_path: Path) -> None:
    check_free(tmp_path, 0)
    with pytest.raises(Exhausted, match="below the floor of 1099511627776 MB"):
        check_free(tmp_path, 2**40)


def test_allocated_is_what_a_sparse_file_takes(tmp_path: Path) -> None:
    path = _image(tmp_path / "sparse" / "file", 64 << 20)
    assert allocated_bytes(path) == 0
    path.write_bytes(b"x" * 4096)
    assert allocated_bytes(path) >= 4096
