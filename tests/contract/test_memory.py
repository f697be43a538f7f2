"""Guest memory between real processes that map a base as a VM does."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from sandmartin.agent.memory import (
    PAGE,
    Base,
    BaseStore,
    Buffer,
    FileId,
    Lease,
    Ram,
    Runs,
    create_empty_base,
    digest_base,
    dump_base,
    fold,
    get_base,
    inject,
    open_diff,
    write_diff,
)
from sandmartin.agent.proc import ProcessId
from sandmartin.errors import Conflict, DiskFull, Invalid, ToolFailed

_MB = 2**20
_SIZE = 16 * _MB
_PAGES = _SIZE // PAGE
_NOBODY = 65534

#: Maps a file in pieces (offset, size), in this order in its address space, two of which never
#: touch, and does to it what it is asked to.
_CHILD = """
import ctypes, errno, fcntl, hashlib, json, mmap, os, random, sys
path, pieces, access, shared, uid = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]
if uid:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    libc.prctl(4, 1, 0, 0, 0)  # what a new program would be: not closed to itself
fd = os.open(path, access)
huge = 2 << 20
room = sum(size + huge for _, size in pieces)
at = libc.mmap(None, room + huge, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
at = -(-at // huge) * huge
views = {}
for offset, size in pieces:
    flags = (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE) | 16  # MAP_FIXED
    assert libc.mmap(at, size, 3, flags, fd, offset) == at, os.strerror(ctypes.get_errno())
    views[offset] = (at, memoryview((ctypes.c_char * size).from_address(at)).cast("B"))
    at += size + huge

def refused(attempt):
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

def write(offset, data):
    for begin, (_, view) in views.items():
        low, high = max(offset, begin), min(offset + len(data), begin + len(view))
        if low < high:
            view[low - begin : high - begin] = data[low - offset : high - offset]

def dirty(runs, page):
    for first, count, seed in runs:
        size = count * page
        write(first * page, random.Random(seed).randbytes(size) if seed else bytes(size))

def digest():
    whole = hashlib.sha256()
    for offset in sorted(views):
        whole.update(views[offset][1])
    return whole.hexdigest()

def advise(advice):
    return [libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(len(view)), advice)
            for at, view in views.values()]

def unmap(offset):
    at, view = views.pop(offset)
    libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(len(view)))

def attack():
    mine = os.open(path, os.O_RDONLY)
    files = [mine, fd] + [n for n in [int(path.rpartition("/")[2])] if "/fd/" in path]
    tries = {}
    for n in files:
        tries |= {
            f"write {n}": lambda: os.pwrite(n, b"x", 0),
            f"shrink {n}": lambda: os.ftruncate(n, 4096),
            f"grow {n}": lambda: os.ftruncate(n, 1 << 30),
            f"allocate {n}": lambda: os.posix_fallocate(n, 0, 1 << 30),
            f"map {n}": lambda: mmap.mmap(n, 4096, flags=mmap.MAP_SHARED, prot=3),
            f"mode {n}": lambda: os.fchmod(n, 0o777),
            f"seal {n}": lambda: fcntl.fcntl(n, fcntl.F_ADD_SEALS, 0),
            f"punch {n}": lambda: (libc.fallocate(n, 3, ctypes.c_long(0), ctypes.c_long(4096))
                and (_ for _ in ()).throw(OSError(ctypes.get_errno(), "")))
        }
        for name in [name for name in tries if name.endswith(f" {n}")]:
            tries[name] = refused(tries[name])
    tries["open to write"] = refused(lambda: os.open(path, os.O_RDWR))
    return tries

calls = {"dirty": dirty, "digest": digest, "advise": advise, "unmap": unmap, "attack": attack}
print("{}", flush=True)
for line in sys.stdin:
    name, *arguments = json.loads(line)
    print(json.dumps(calls[name](*arguments)), flush=True)
"""

#: (first page, pages, seed of what is written; 0 for zeroes)
Dirt = list[tuple[int, int, int]]
Pieces = Sequence[tuple[int, int]]
_WHOLE: Pieces = [(0, _SIZE)]


class Child:
    """A process with a RAM. It is stopped by `stop` alone, and killed at the end."""

    def __init__(
        self,
        over: Lease | Path,
        pieces: Pieces = _WHOLE,
        *,
        access: int = os.O_RDONLY,
        shared: bool = False,
        uid: int = 0,
    ) -> None:
        path, fds = (over, ()) if isinstance(over, Path) else (over.path, (over.fd,))
        setting = json.dumps([str(path), pieces, access, shared, uid])
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, setting],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=fds,
        )
        identity = ProcessId.of(self._process.pid)
        assert identity is not None
        self.process = identity
        self._file = FileId.of(path)

    def __enter__(self) -> Child:
        assert self._answer() == {}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def ask(self, *words: object) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def dirty(self, dirt: Dirt) -> None:
        self.ask("dirty", dirt, PAGE)

    def stop(self) -> None:
        self.process.kill(signal.SIGSTOP)
        _, status = os.waitpid(self.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def go_on(self) -> None:
        self.process.kill(signal.SIGCONT)

    def ram(self) -> Ram:
        return Ram.find(self.process, self._file)


def some_dirt(chance: random.Random, runs: int = 60) -> Dirt:
    """Runs that touch and overlap now and then, a quarter of them zeroes."""
    found: Dirt = [(0, 1, 1), (_PAGES - 2, 2, 2)]
    for _ in range(runs):
        first = chance.randrange(_PAGES)
        count = min(chance.choice([1, 2, 3, 40]), _PAGES - first)
        found.append((first, count, chance.randrange(1, 2**31) if chance.random() < 0.75 else 0))
    return found


def dirtied(image: bytearray, dirt: Dirt) -> set[int]:
    """What a RAM becomes, and which of its pages are then its own."""
    for first, count, seed in dirt:
        size = count * PAGE
        image[first * PAGE : first * PAGE + size] = (
            random.Random(seed).randbytes(size) if seed else bytes(size)
        )
    return {page for first, count, _ in dirt for page in range(first, first + count)}


def pages_of(runs: Runs) -> set[int]:
    return {page for first, end in runs for page in range(first, end)}


def make_base(tmp_path: Path, chance: random.Random) -> tuple[Base, bytearray]:
    """A base with data and holes, and what is in it."""
    empty = create_empty_base(tmp_path / "empty", _SIZE)
    image = bytearray(_SIZE)
    pages = sorted(dirtied(image, some_dirt(chance, 30)))
    runs = Runs.of(pages, [page + 1 for page in pages])
    data = memoryview(b"".join(image[page * PAGE : (page + 1) * PAGE] for page in pages))
    written = write_diff(tmp_path / "first", empty, runs, [data], sync=False)
    with open_diff(tmp_path / "first", written.digest) as diff:
        return fold(empty, diff, tmp_path / "base"), image


def frozen(child: Child, base: Base, path: Path, buffer: Buffer) -> str:
    """The diff of a child that stands still, and goes on before it is written."""
    child.stop()
    ram = child.ram()
    runs = ram.scan()
    data = ram.read(runs, buffer)
    child.go_on()
    return write_diff(path, base, runs, [data], sync=False).digest


def both_scans(ram: Ram) -> set[int]:
    by_entries = ram.scan_by_entries()
    try:
        assert ram.scan_by_ioctl() == by_entries
    except ToolFailed as error:
        # A kernel before 6.7: only the one way there is.
        assert isinstance(error.__cause__, OSError)
        assert error.__cause__.errno == errno.ENOTTY
    assert ram.scan() == by_entries
    return pages_of(by_entries)


@contextlib.asynccontextmanager
async def store(*, in_memory: bool, budget_bytes: int = 0) -> Any:
    held = BaseStore(in_memory=in_memory, budget_bytes=budget_bytes)
    try:
        yield held
    finally:
        await held.close()


_IN_PIECES: Pieces = [(7 * _MB, 9 * _MB), (0, 3 * _MB), (3 * _MB, 4 * _MB)]


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(("seed", "pieces"), [(1, _WHOLE), (2, _IN_PIECES)])
async def test_a_ram_comes_back_byte_for_byte(
    tmp_path: Path, in_memory: bool, seed: int, pieces: Pieces
) -> None:
    chance = random.Random(seed)
    base, image = make_base(tmp_path, chance)
    access = os.O_RDWR if in_memory else os.O_RDONLY
    buffer = Buffer()
    own: set[int] = set()
    digest = ""
    async with store(in_memory=in_memory) as bases:
        lease = await bases.acquire(base)
        # Three lives: each starts from the diff of the one before, and dirties more.
        for life in range(3):
            with Child(lease, pieces, access=access) as child:
                if digest:
                    with open_diff(tmp_path / "diff", digest) as diff:
                        inject(child.ram(), diff)
                assert child.ask("digest") == hashlib.sha256(image).hexdigest()
                dirt = some_dirt(chance)
                child.dirty(dirt)
                own |= dirtied(image, dirt)
                digest = frozen(child, base, tmp_path / "diff", buffer)
                assert both_scans(child.ram()) == own
                child.stop()
                dumped = dump_base(child.ram(), base, tmp_path / f"dump{life}")
        with open_diff(tmp_path / "diff", digest) as diff:
            assert pages_of(diff.runs) == own
            whole = fold(base, diff, tmp_path / "whole")
    assert whole.path.read_bytes() == image
    assert whole.digest == dumped.digest
    assert digest_base(base.path) == base.digest


async def test_many_small_runs_and_a_small_buffer(tmp_path: Path) -> None:
    """More runs than one call takes, and pages that never are in memory all at once."""
    base = create_empty_base(tmp_path / "empty", _SIZE)
    image = bytearray(_SIZE)
    dirt = [(page, 1, page + 1) for page in range(0, _PAGES, 2)]
    own = dirtied(image, dirt)
    async with store(in_memory=False) as bases:
        lease = await bases.acquire(base)
        with Child(lease) as child, Child(lease, _IN_PIECES) as other:
            child.dirty(dirt)
            child.stop()
            ram = child.ram()
            runs = ram.scan()
            assert len(runs) == _PAGES // 2 > 1024
            pages = b"".join(image[page * PAGE : (page + 1) * PAGE] for page in sorted(own))
            assert ram.read(runs, Buffer()) == pages
            small = Buffer(37 * PAGE)
            parts = (data for _, data in ram.parts(runs, small))
            written = write_diff(tmp_path / "diff", base, runs, parts, sync=True)
            assert small.size_bytes == 37 * PAGE
            with open_diff(tmp_path / "diff", written.digest) as diff:
                inject(other.ram(), diff)
            assert other.ask("digest") == hashlib.sha256(image).hexdigest()
            assert both_scans(other.ram()) == own


@pytest.mark.root
async def test_huge_pages_are_told_apart_to_the_page(tmp_path: Path) -> None:
    image = bytearray(random.Random(6).randbytes(_SIZE))
    options = ["-t", "tmpfs", "-o", f"huge=always,size={3 * _SIZE}"]
    with mounted(*options, "tmpfs", at=tmp_path / "huge") as where:
        (where / "base").write_bytes(image)
        (where / "base").chmod(0o444)
        base = get_base(where / "base")
        async with store(in_memory=False) as bases:
            lease = await bases.acquire(base)
            with Child(lease) as child:
                child.ask("advise", 14)  # MADV_HUGEPAGE
                child.ask("digest")
                if not mapped_huge_bytes(child):
                    pytest.skip("this kernel gives files no huge pages")
                child.stop()
                assert both_scans(child.ram()) == set()
                child.go_on()
                dirt: Dirt = [(3, 1, 5), (513, 511, 6), (1024, 512, 0), (2047, 2, 7)]
                own = dirtied(image, dirt)
                child.dirty(dirt)
                assert mapped_huge_bytes(child)
                digest = frozen(child, base, tmp_path / "diff", Buffer())
                assert both_scans(child.ram()) == own
            lease.release()
        with open_diff(tmp_path / "diff", digest) as diff:
            assert fold(base, diff, tmp_path / "whole").path.read_bytes() == image


def mapped_huge_bytes(child: Child) -> int:
    lines = Path(f"/proc/{child.process.pid}/smaps").read_text().splitlines()
    huge = ("ShmemPmdMapped:", "FilePmdMapped:", "AnonHugePages:")
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(huge))


async def test_pages_that_were_swapped_out_are_dirtied_ones(tmp_path: Path) -> None:
    if len(Path("/proc/swaps").read_text().splitlines()) < 2:
        pytest.skip("this host has no swap")
    base, image = make_base(tmp_path, random.Random(3))
    dirt: Dirt = [(100, 200, 8), (1000, 3, 0)]
    own = dirtied(image, dirt)
    async with store(in_memory=False) as bases:
        lease = await bases.acquire(base)
        with Child(lease) as child, Child(lease) as other:
            child.dirty(dirt)
            assert child.ask("advise", 21) == [0]  # MADV_PAGEOUT
            child.stop()
            smaps = Path(f"/proc/{child.process.pid}/smaps").read_text()
            swapped = sum(int(s.split()[1]) for s in smaps.splitlines() if s.startswith("Swap:"))
            assert swapped > 0
            assert both_scans(child.ram()) == own
            child.go_on()
            digest = frozen(child, base, tmp_path / "diff", Buffer())
            with open_diff(tmp_path / "diff", digest) as diff:
                inject(other.ram(), diff)
            assert other.ask("digest") == hashlib.sha256(image).hexdigest()


async def test_a_ram_that_is_not_what_it_should_be_is_refused(tmp_path: Path) -> None:
    base = create_empty_base(tmp_path / "empty", _SIZE)
    writable = tmp_path / "writable"
    writable.write_bytes(bytes(_SIZE))
    runs = Runs.of([_PAGES // 2], [_PAGES // 2 + 1])
    async with store(in_memory=False) as bases:
        lease = await bases.acquire(base)
        twice = [(0, 2 * _MB), (_MB, _SIZE - _MB)]
        with Child(lease, twice) as child, pytest.raises(Conflict, match="just once"):
            child.ram()
        with Child(lease, [(0, 4 * _MB), (4 * _MB, 4 * _MB), (8 * _MB, 8 * _MB)]) as child:
            ram = child.ram()
            child.dirty([(_PAGES // 2 - 1, 2, 1)])
            child.ask("unmap", 8 * _MB)
            with pytest.raises(ToolFailed):
                ram.read(runs, Buffer())
            with pytest.raises(ToolFailed):
                ram.write(runs, Buffer())
            # Cut short, it is a RAM of another size, which no base of ours has.
            with pytest.raises(Conflict, match="bytes"):
                dump_base(child.ram(), base, tmp_path / "dump")
            child.ask("unmap", 4 * _MB)
            child.ask("unmap", 0)
            with pytest.raises(Conflict, match="does not map"):
                child.ram()
        with pytest.raises(ToolFailed):
            ram.scan()
        with pytest.raises(ToolFailed):
            ram.read(runs, Buffer())
    with (
        Child(writable, access=os.O_RDWR, shared=True) as child,
        pytest.raises(Conflict, match="shared"),
    ):
        child.ram()


@pytest.mark.root
@pytest.mark.parametrize("in_memory", [False, True])
async def test_the_user_of_a_vm_cannot_change_a_base(tmp_path: Path, in_memory: bool) -> None:
    base, image = make_base(tmp_path, random.Random(4))
    access = os.O_RDWR if in_memory else os.O_RDONLY
    before = base.path.stat()
    async with store(in_memory=in_memory) as bases:
        lease = await bases.acquire(base)
        with Child(lease, access=access, uid=_NOBODY) as child:
            tries = child.ask("attack")
            assert len(tries) == 8 * 3 + 1
            # A copy in memory may be opened to write, as old versions of QEMU must.
            assert tries.pop("open to write") == ("done" if in_memory else "EACCES")
            assert "done" not in tries.values(), tries
            own = dirtied(image, [(0, 64, 9)])
            child.dirty([(0, 64, 9)])
            assert child.ask("digest") == hashlib.sha256(image).hexdigest()
            assert both_scans(child.ram()) == own
        assert digest_base(base.path) == base.digest
        assert base.path.stat() == before
        with Child(lease, access=access, uid=_NOBODY) as other:
            assert other.ask("digest") == hashlib.sha256(base.path.read_bytes()).hexdigest()


async def test_a_base_is_loaded_once_and_given_up_when_long_unused(tmp_path: Path) -> None:
    made = [make_base_of(tmp_path, number) for number in range(4)]
    async with store(in_memory=True, budget_bytes=5 * _MB) as bases:
        first = [asyncio.create_task(bases.acquire(made[0])) for _ in range(8)]
        await asyncio.sleep(0)
        # The one that asked first gives up; the others get what it asked for.
        first[0].cancel()
        leases = [await task for task in first[1:]]
        assert len({lease.fd for lease in leases}) == 1
        assert first[0].cancelled()
        assert copies() == {made[0].digest[:12]}
        others = [await bases.acquire(base) for base in made[1:3]]
        # Above the budget, but all in use.
        assert 6 * _MB <= bases.resident_bytes < 7 * _MB
        others[0].release()
        assert bases.resident_bytes < 5 * _MB
        for lease in [*leases, *leases]:
            lease.release()
        assert bases.resident_bytes < 5 * _MB
        again = await bases.acquire(made[0])
        assert again.fd == leases[0].fd
        again.release()
        others[1].release()
        (await bases.acquire(made[3])).release()
        await settled(bases)
        assert copies() == {made[2].digest[:12], made[3].digest[:12]}
    assert copies() == set()


def make_base_of(tmp_path: Path, number: int) -> Base:
    """A base with 2 MB of data."""
    path = tmp_path / f"base{number}"
    with path.open("wb") as file:
        file.write(random.Random(number).randbytes(2 * _MB))
        file.truncate(_SIZE)
    path.chmod(0o444)
    return get_base(path)


def copies() -> set[str]:
    """The copies of bases that this process holds, by the begin of their checksums."""
    # The descriptor that lists them is among them, and closed by now.
    links = [str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.exists()]
    prefix = "/memfd:sandmartin-base-"
    return {link.removeprefix(prefix)[:12] for link in links if link.startswith(prefix)}


async def settled(bases: BaseStore) -> None:
    """Wait until what was given up is closed."""
    async with asyncio.timeout(10):
        while bases._closing:
            await asyncio.wait(bases._closing)


@pytest.mark.parametrize("in_memory", [False, True])
async def test_a_base_that_was_changed_is_not_leased(tmp_path: Path, in_memory: bool) -> None:
    base = make_base_of(tmp_path, 1)
    content = base.path.read_bytes()
    async with store(in_memory=in_memory) as bases:
        (await bases.acquire(base)).release()
        changed = bytearray(content)
        changed[_MB] ^= 1
        for wrong in (bytes(changed), content[:-PAGE], content + bytes(PAGE)):
            base.path.chmod(0o600)
            base.path.write_bytes(wrong)
            with pytest.raises(Invalid, match="written to by others"):
                await bases.acquire(base)
            base.path.chmod(0o444)
            results = await asyncio.gather(
                bases.acquire(base), bases.acquire(base), return_exceptions=True
            )
            assert [type(result) for result in results] == [Invalid, Invalid]
        base.path.chmod(0o600)
        base.path.write_bytes(content)
        base.path.chmod(0o444)
        lease = await bases.acquire(base)
        assert Path(lease.path).read_bytes() == content


async def test_a_new_agent_takes_over_the_copy_a_vm_has_open(tmp_path: Path) -> None:
    base, other = make_base_of(tmp_path, 1), make_base_of(tmp_path, 2)
    async with store(in_memory=True) as earlier:
        lease = await earlier.acquire(base)
        file = lease.file
        with Child(lease, access=os.O_RDWR) as child:
            await earlier.close()
            assert copies() == set()
            async with store(in_memory=True) as bases:
                assert await bases.adopt(other, child.process, file) is None
                assert await bases.adopt(base, child.process, FileId.of(base.path)) is None
                adopted = await bases.adopt(base, child.process, file)
                assert adopted is not None
                assert adopted.file == file
                assert (await bases.acquire(base)).fd == adopted.fd
                # It serves new VMs as the first one did.
                with Child(adopted, access=os.O_RDWR) as second:
                    assert second.ask("digest") == child.ask("digest")
            async with store(in_memory=True) as bases:
                anew = await bases.acquire(base)
                assert anew.file != file
                assert await bases.adopt(base, child.process, file) is None


@contextlib.contextmanager
def mounted(*words: str | Path, at: Path) -> Iterator[Path]:
    at.mkdir()
    subprocess.run(["mount", *words, at], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


@pytest.mark.root
async def test_a_full_disk_leaves_the_last_diff_whole(tmp_path: Path) -> None:
    base = create_empty_base(tmp_path / "empty", _SIZE)
    runs = Runs.of([0], [64])
    with mounted("-t", "tmpfs", "-o", "size=1m", "tmpfs", at=tmp_path / "small") as small:
        data = memoryview(os.urandom(runs.size_bytes))
        written = write_diff(small / "diff", base, runs, [data], sync=True)
        more = Runs.of([0], [1024])
        with pytest.raises(DiskFull):
            write_diff(small / "diff", base, more, [memoryview(bytes(4 * _MB))], sync=True)
        assert [path.name for path in small.iterdir()] == ["diff"]
        with open_diff(small / "diff", written.digest) as diff, pytest.raises(DiskFull):
            big = make_base_of(tmp_path, 1)
            full = write_diff(tmp_path / "over", big, diff.runs, [data], sync=False)
            with open_diff(tmp_path / "over", full.digest) as over:
                fold(big, over, small / "folded")
        assert [path.name for path in small.iterdir()] == ["diff"]


_REFLINK = {"xfs": ["mkfs.xfs", "-q"], "btrfs": ["mkfs.btrfs", "-q"]}


@pytest.mark.root
@pytest.mark.parametrize("kind", _REFLINK)
async def test_a_fold_shares_its_data_where_the_file_system_can(tmp_path: Path, kind: str) -> None:
    if shutil.which(_REFLINK[kind][0]) is None:
        pytest.skip(f"{_REFLINK[kind][0]} is not installed")
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(400 * _MB)
    subprocess.run([*_REFLINK[kind], disk], check=True)
    with mounted("-o", "loop", disk, at=tmp_path / "mounted") as where:
        base = create_empty_base(where / "empty", 256 * _MB)
        pages = 256 * _MB // PAGE
        runs = Runs.of([0], [pages // 2])
        content = memoryview(random.Random(5).randbytes(64 * _MB))
        written = write_diff(where / "diff", base, runs, [content, content], sync=False)
        with open_diff(where / "diff", written.digest) as diff:
            first = fold(base, diff, where / "first")
        (where / "diff").unlink()
        before = shutil.disk_usage(where).free
        dirt: Dirt = [(5, 3, 1), (900, 100, 0), (pages // 2 + 7, 1, 2)]
        async with store(in_memory=False) as bases:
            lease = await bases.acquire(first)
            with Child(lease, [(0, 256 * _MB)]) as child:
                child.dirty(dirt)
                child.stop()
                second = dump_base(child.ram(), first, where / "second")
            lease.release()
        image = bytearray(first.path.read_bytes())
        dirtied(image, dirt)
        assert second.path.read_bytes() == image
        # Two of these would not fit beside each other with data of their own.
        assert before - shutil.disk_usage(where).free < 16 * _MB
