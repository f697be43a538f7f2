"""A folder as a tar that is made while it is sent."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandmartin.client.packing import Contents, Packing
from sandmartin.errors import Conflict

MIB = 1 << 20


class Read:
    """What is told of files that are read; `at_once` is done at the first."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, bool]] = []
        self.at_once: Callable[[], None] = lambda: None

    async def __call__(self, path: str, size: int, is_whole: bool) -> None:
        self.told.append((path, size, is_whole))
        self.at_once()

    @contextlib.contextmanager
    def reading(self, local: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise Conflict(f"{local.name} cannot be read") from error


async def packed(source: Path, contents: Contents, read: Read) -> bytes:
    packing = Packing(source, "named", contents, reading=read.reading, on_read=read)
    return b"".join([piece async for piece in packing.pieces()])


async def test_all_is_in_it_as_roots(tmp_path: Path) -> None:
    long = "d/" + "long" * 50 + "\u00fc"
    (tmp_path / "d").mkdir()
    large = os.urandom(2 * MIB + 3)
    for name, content in (("large", large), ("d/empty", b""), (long, b"deep")):
        (tmp_path / name).write_bytes(content)
    contents = Contents(
        directories={"": 0o711, "d": 0o755},
        files={"large": (0, 0o755), "d/empty": (0, 0o600), long: (4, 0o644)},
        links={"d/link": "../large"},
    )
    read = Read()
    with tarfile.open(fileobj=io.BytesIO(await packed(tmp_path, contents, read))) as tar:
        found = {each.name: each for each in tar}
        file = tar.extractfile("named/large")
        assert file is not None
        assert file.read() == large
    assert {name: each.mode for name, each in found.items()} == {
        "named": 0o711,
        "named/d": 0o755,
        "named/large": 0o755,
        "named/d/empty": 0o600,
        f"named/{long}": 0o644,
        "named/d/link": 0o777,
    }
    assert {(each.uid, each.gid) for each in found.values()} == {(0, 0)}
    assert found["named/d/link"].linkname == "../large"
    assert [path for path, _, is_whole in read.told if is_whole] == ["large", "d/empty", long]
    assert sum(size for _, size, _ in read.told) == len(large) + 4


async def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    file, read = tmp_path / "file", Read()
    contents = Contents(directories={}, files={"file": (0, 0o644)}, links={})
    file.write_bytes(b"a" * 3 * MIB)
    read.at_once = lambda: os.truncate(file, 5 * MIB)
    with tarfile.open(fileobj=io.BytesIO(await packed(tmp_path, contents, read))) as tar:
        assert [each.size for each in tar] == [3 * MIB]
    read.at_once = lambda: os.truncate(file, MIB)
    with pytest.raises(Conflict, match="became shorter while it was read"):
        await packed(tmp_path, contents, read)
    file.unlink()
    with pytest.raises(Conflict, match="file cannot be read"):
        await packed(tmp_path, contents, read)
