"""Files of guest memory: what is refused, what is sparse, what a checksum covers."""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import struct
from array import array
from collections.abc import Iterable
from pathlib import Path

import pytest

from sandmartin.agent.memory import (
    PAGE,
    Base,
    Buffer,
    Runs,
    Written,
    create_empty_base,
    digest_base,
    fold,
    get_base,
    open_diff,
    write_diff,
)
from sandmartin.agent.memory.ram import _move
from sandmartin.errors import AlreadyExists, Invalid, NotFound

_PAGES = 1024


def runs_of(pages: Iterable[int]) -> Runs:
    ordered = sorted(pages)
    return Runs.of(ordered, [page + 1 for page in ordered])


def pages_of(runs: Runs) -> list[int]:
    return [page for first, end in runs for page in range(first, end)]


@pytest.fixture
def base(tmp_path: Path) -> Base:
    return create_empty_base(tmp_path / "empty", _PAGES * PAGE)


@pytest.fixture
def diff(tmp_path: Path, base: Base) -> tuple[Path, Written]:
    path = tmp_path / "diff"
    runs = runs_of([1, 2, 3, 9, 700])
    return path, write_diff(path, base, runs, [memoryview(os.urandom(5 * PAGE))], sync=True)


def test_runs_are_the_set_of_their_pages() -> None:
    chance = random.Random(11)
    for _ in range(50):
        pages = chance.sample(range(_PAGES), chance.randrange(1, _PAGES))
        runs = runs_of(pages)
        assert pages_of(runs) == sorted(pages)
        assert runs.fit(max(pages) + 1)
        assert not runs.fit(max(pages))
        window = range(*sorted(chance.sample(range(_PAGES), 2)))
        assert pages_of(runs.within(window)) == sorted(set(pages) & set(window))
        size = chance.randrange(1, 200)
        batches = list(runs.batches(size))
        assert [page for batch in batches for page in pages_of(batch)] == sorted(pages)
        assert all(batch.pages == size for batch in batches[:-1])
        assert 0 < batches[-1].pages <= size
    assert list(runs_of([]).batches(8)) == []


def test_a_transfer_that_stops_short_goes_on_where_it_stopped() -> None:
    chance = random.Random(12)
    source = ctypes.create_string_buffer(chance.randbytes(3_000_000))
    addresses, sizes, at = array("Q"), array("Q"), 0
    while at < 2_900_000:
        addresses.append(ctypes.addressof(source) + at)
        sizes.append(chance.randrange(1, 2500))
        at += sizes[-1] + chance.randrange(0, 300)
    assert len(sizes) > 2048
    expected = b"".join(map(ctypes.string_at, addresses, sizes))
    target = ctypes.create_string_buffer(len(expected))
    calls = 0

    def short(
        pid: int,
        mine: ctypes.Array[ctypes.c_uint64],
        one: int,
        remote: int,
        count: int,
        flags: int,
    ) -> int:
        nonlocal calls
        calls += 1
        address, room = mine
        room = min(room, chance.choice([1, 5000, 100_000, room]))
        vectors = array("Q", ctypes.string_at(remote, 16 * count))
        done = 0
        for begin, size in zip(vectors[0::2], vectors[1::2], strict=True):
            part = min(size, room - done)
            ctypes.memmove(address + done, begin, part)
            done += part
        return done

    _move(short, 0, ctypes.addressof(target), addresses, sizes)
    assert target.raw == expected
    assert calls > len(sizes) // 1024 + 1


def test_a_diff_gives_back_its_runs_and_pages(tmp_path: Path, base: Base) -> None:
    runs = runs_of(range(0, _PAGES, 3))
    content = random.Random(13).randbytes(runs.size_bytes)
    view = memoryview(content)
    parts = [view[at : at + 7 * PAGE] for at in range(0, len(view), 7 * PAGE)]
    written = write_diff(tmp_path / "diff", base, runs, parts, sync=False)
    assert written.size_bytes == (tmp_path / "diff").stat().st_size
    with open_diff(tmp_path / "diff", written.digest) as diff:
        assert (diff.base_digest, diff.ram_bytes) == (base.digest, base.size_bytes)
        assert diff.runs == runs
        read = [(pages_of(part), bytes(data)) for part, data in diff.parts(Buffer(5 * PAGE))]
    assert b"".join(data for _, data in read) == content
    assert [page for pages, _ in read for page in pages] == pages_of(runs)


def test_an_empty_diff_is_one(tmp_path: Path, base: Base) -> None:
    written = write_diff(tmp_path / "diff", base, runs_of([]), [], sync=False)
    with open_diff(tmp_path / "diff", written.digest) as diff:
        assert fold(base, diff, tmp_path / "same").digest == base.digest


def test_what_was_there_stays_when_a_diff_cannot_be_written(
    tmp_path: Path, base: Base, diff: tuple[Path, Written]
) -> None:
    path, written = diff
    before = sorted(tmp_path.iterdir())
    with pytest.raises(Invalid, match="2 pages were announced"):
        write_diff(path, base, runs_of([4, 5]), [memoryview(bytes(PAGE))], sync=False)
    with pytest.raises(Invalid, match="not all inside"):
        write_diff(path, base, runs_of([_PAGES]), [memoryview(bytes(PAGE))], sync=False)
    assert sorted(tmp_path.iterdir()) == before
    with open_diff(path, written.digest):
        pass


def test_every_changed_byte_and_every_lost_one_is_noticed(diff: tuple[Path, Written]) -> None:
    path, written = diff
    content = path.read_bytes()
    head = 72 + 2 * 3 * 8
    chance = random.Random(14)
    for at in [*range(head), *(chance.randrange(head, len(content)) for _ in range(50))]:
        path.write_bytes(
            content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]
        )
        refuse(path, written.digest)
    for size in [0, 1, 71, 72, head, PAGE - 1, PAGE, len(content) - PAGE, len(content) - 1]:
        path.write_bytes(content[:size])
        refuse(path, written.digest)
    path.write_bytes(content + b"\0")
    refuse(path, written.digest)
    path.write_bytes(content)
    with open_diff(path, written.digest):
        pass


def refuse(path: Path, digest: str) -> None:
    with pytest.raises(Invalid) as refused, open_diff(path, digest):
        pass
    assert str(path) in refused.value.message


def forged(path: Path, firsts: list[int], ends: list[int], pages: int, **changed: int) -> str:
    """A file by a knowing hand: whatever its head says, its checksum and its size are right."""
    members = {"version": 1, "page": PAGE, "ram": _PAGES * PAGE, "count": len(firsts)} | changed
    head = struct.pack(
        "<8sIIQ32sQQ",
        *(b"SNDMDIFF", members["version"], members["page"], members["ram"], bytes(32)),
        *(members["count"], pages),
    )
    head += array("Q", firsts).tobytes() + array("Q", ends).tobytes()
    content = head + bytes(-len(head) % PAGE) + bytes(min(pages, 3 * _PAGES) * PAGE)
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def test_a_forged_head_is_refused_even_with_its_own_checksum(tmp_path: Path) -> None:
    path = tmp_path / "diff"
    with open_diff(path, forged(path, [1, 5], [2, 7], 3)) as diff:
        assert pages_of(diff.runs) == [1, 5, 6]
    for firsts, ends, pages in [
        ([5, 1], [7, 2], 3),
        ([1, 2], [3, 4], 4),
        ([1, 3], [3, 4], 3),
        ([3], [3], 0),
        ([4], [2], 2**64 - 2),
        ([_PAGES - 1], [_PAGES + 1], 2),
        ([0], [2**63], 2),
        ([1], [3], 3),
    ]:
        refuse(path, forged(path, firsts, ends, pages))
    for changed in [
        {"version": 2},
        {"page": 2 * PAGE},
        {"ram": _PAGES * PAGE + 1},
        {"ram": 2 * PAGE},
        {"ram": 2**60},
        {"count": 2**40},
        {"count": 4},
    ]:
        refuse(path, forged(path, [1, 5], [2, 7], 3, **changed))


def test_what_is_no_file_is_refused(tmp_path: Path, diff: tuple[Path, Written]) -> None:
    path, written = diff
    (tmp_path / "link").symlink_to(path)
    os.mkfifo(tmp_path / "pipe")
    for name in ["link", "pipe", "."]:
        refuse(tmp_path / name, written.digest)
    with pytest.raises(NotFound), open_diff(tmp_path / "none", written.digest):
        pass


def test_a_checksum_is_of_the_content_not_of_its_holes(tmp_path: Path) -> None:
    size = 5 * 2**20 + 3 * PAGE
    content = bytearray(size)
    content[0] = content[2**20 + 17] = content[size - 1] = 1
    (tmp_path / "dense").write_bytes(content)
    with (tmp_path / "sparse").open("wb") as sparse:
        sparse.truncate(size)
        for at in (0, 2**20 + 17, size - 1):
            os.pwrite(sparse.fileno(), b"\1", at)
    assert digest_base(tmp_path / "sparse") == digest_base(tmp_path / "dense")
    seen = {digest_base(tmp_path / "dense")}
    for at in (1, 2**20 + 18, 3 * 2**20, size - 2):
        content[at] = 1
        (tmp_path / "dense").write_bytes(content)
        seen.add(digest_base(tmp_path / "dense"))
        content[at] = 0
    (tmp_path / "dense").write_bytes(content + bytes(PAGE))
    seen.add(digest_base(tmp_path / "dense"))
    (tmp_path / "dense").write_bytes(content[2**20 :] + content[: 2**20])
    seen.add(digest_base(tmp_path / "dense"))
    assert len(seen) == 7


def test_a_fold_is_the_base_with_the_pages_in_it_and_sparse(tmp_path: Path, base: Base) -> None:
    image, first = folded(tmp_path, base, bytearray(base.size_bytes), range(0, 300), "first")
    assert first.path.read_bytes() == image
    # Over data: pages that change, that become zero, and zeroes where there was a hole.
    image, second = folded(tmp_path, first, image, range(200, 500, 2), "second")
    assert second.path.read_bytes() == image
    assert second == get_base(second.path)
    (tmp_path / "dense").write_bytes(image)
    assert second.digest == digest_base(tmp_path / "dense")
    used = sum(image[at : at + PAGE] != bytes(PAGE) for at in range(0, len(image), PAGE))
    assert second.path.stat().st_blocks * 512 < (used + 32) * PAGE < second.size_bytes
    assert second.path.stat().st_mode & 0o777 == 0o444
    assert not list(tmp_path.glob(".*"))


def folded(
    tmp_path: Path, base: Base, image: bytearray, pages: Iterable[int], name: str
) -> tuple[bytearray, Base]:
    """A fold of pages, every third of them zero, and the image it must be."""
    runs, parts = runs_of(pages), []
    for page in pages_of(runs):
        part = bytes(PAGE) if page % 3 == 0 else os.urandom(PAGE)
        image[page * PAGE : (page + 1) * PAGE] = part
        parts.append(memoryview(part))
    written = write_diff(tmp_path / "diff", base, runs, parts, sync=False)
    with open_diff(tmp_path / "diff", written.digest) as diff:
        return image, fold(base, diff, tmp_path / name)


def test_a_base_is_never_written_again(
    tmp_path: Path, base: Base, diff: tuple[Path, Written]
) -> None:
    path, written = diff
    with open_diff(path, written.digest) as opened:
        other = fold(base, opened, tmp_path / "other")
        before = other.path.stat()
        with pytest.raises(AlreadyExists):
            fold(base, opened, other.path)
        with pytest.raises(AlreadyExists):
            create_empty_base(other.path, PAGE)
        with pytest.raises(Invalid, match="not over"):
            fold(other, opened, tmp_path / "third")
    assert other.path.stat() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diff", "empty", "other"]
