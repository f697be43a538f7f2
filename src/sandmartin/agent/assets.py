"""What every VM is made of: kernel, guest agent, initramfs and the built-in images.

Each asset is a directory in the store named by its kind and the hash of all that went into it,
built beside and renamed whole, under a lock, and never changed afterwards. So a second setup has
nothing to do, a changed input makes a new entry, and what runs on an old one keeps it.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import lzma
import os
import shlex
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from sandmartin.agent import packages, proc, traits, wheels
from sandmartin.agent.filesystem import make_file_system
from sandmartin.agent.journal import check_reachable
from sandmartin.errors import NotFound, ToolFailed
from sandmartin.model import Settings, random_id

Report = Callable[[str], None]

#: The built-in image that others stand on unless they say otherwise, and that is always there.
BASE = "base"
#: What an image says that stands on none: its recipe makes all of it.
_SCRATCH = "scratch"
#: Asks for every image that there is a recipe of.
ALL = "all"
#: Suite of the kernel and the base image: one on every host, so that all hosts run the same.
SUITE = "bookworm"
_KERNEL_PACKAGE = "linux-image-cloud-amd64"
_BUILD_DEADLINE_S = 1800.0
_LOCK_RETRY_S = 0.2
#: In load order before their dependencies are known; virtio_ring comes before virtio by them.
_MODULES = (
    *("virtio_mmio", "virtio_blk", "virtio_net", "virtio-rng", "virtio_balloon"),
    # By these a guest that was moved ends its connections.
    *("inet_diag", "tcp_diag", "udp_diag"),
)
#: What tools leave among the sources.
_MADE = {"bin", "__pycache__"}
_ROOT = Path(__file__).resolve().parents[3]
_GUEST_SOURCES = _ROOT / "guest"
_IMAGE_SOURCES = _ROOT / "images"
#: A wheel brings what a checkout builds.
_PACKED = Path(__file__).resolve().parent / "packed"


@dataclass(frozen=True)
class Assets:
    """Paths of all that a VM needs."""

    kernel: Path
    initramfs: Path
    images: Mapping[str, Path]

    @classmethod
    def find(cls, settings: Settings) -> Assets:
        """The assets that fit this version: of the built-in images `base`, and what else is built.

        Raises NotFound when setup has to be run.
        """
        store = settings.assets_dir.absolute()
        kernel, initramfs, base = (store / e for e in (_kernel(), _initramfs(), _image(BASE)))
        for path in (kernel, initramfs, base):
            if not path.is_dir():
                raise NotFound(
                    f"{path.name} is not in {store}", hint="run `sandmartin setup` as root"
                )
        return cls(
            kernel=kernel / "vmlinuz",
            initramfs=initramfs / "initramfs.cpio",
            images={
                name: path
                for name in built_in_images()
                if (path := store / _image(name) / "rootfs.ext4").exists()
            },
        )


# Names of the entries: kind and hash of the inputs.


def _name(kind: str, *inputs: bytes) -> str:
    digest = hashlib.sha256()
    for part in inputs:
        digest.update(len(part).to_bytes(8, "big") + part)
    return f"{kind}-{digest.hexdigest()[:12]}"


def _tree(root: Path) -> Iterator[bytes]:
    for path in sorted(root.rglob("*")):
        if path.name.endswith("_test.go"):
            continue  # goes into no asset
        if path.is_file() and not _MADE & set(path.relative_to(root).parts):
            yield os.fsencode(path.relative_to(root))
            yield path.read_bytes()


def _kernel() -> str:
    return _name("kernel", SUITE.encode(), _KERNEL_PACKAGE.encode(), repr(_MODULES).encode())


def _guest() -> str:
    packed = _PACKED / "sandmartin-guest"
    if packed.exists():
        return _name("guest", packed.read_bytes())
    return _name("guest", *_tree(_GUEST_SOURCES))


def _initramfs() -> str:
    return _name("initramfs", _kernel().encode(), _guest().encode())


def _recipes() -> Path:
    return _PACKED / "images" if (_PACKED / "images").exists() else _IMAGE_SOURCES


def built_in_images() -> list[str]:
    """Names of the images that there are recipes of."""
    return sorted(path.parent.name for path in _recipes().glob("*/customize"))


def _image(name: str) -> str:
    below = [_image(each).encode() for each in _below(name)]
    return _name(name, *below, SUITE.encode(), *_tree(_recipes() / name))


def _below(name: str) -> list[str]:
    """The image that another one stands on, if any: its recipe's `from` names it, or it is base."""
    named = [BASE] if name != BASE else []
    return [each for each in _words(_recipes() / name / "from") or named if each != _SCRATCH]


# Setup.


async def setup(settings: Settings, report: Report, images: Collection[str] = ()) -> None:
    """Make this host ready: packages, kernel, guest agent, initramfs, base image. Idempotent.

    Further built-in `images`, or `all` of them, are built as well; they take longer.
    Raises ToolFailed with what to do when a step fails, Invalid when the VMs' users could not
    reach the store, NotFound for an image that there is no recipe of.
    """
    if ALL in images:
        images = built_in_images()
    if unknown := set(images) - set(built_in_images()):
        raise NotFound(
            f"there is no built-in template {sorted(unknown)[0]!r}",
            hint=f"there are: {', '.join(built_in_images())}",
        )
    if missing := packages.find_missing():
        report(f"installing {', '.join(missing)}")
        await packages.install(missing)
    store = settings.assets_dir.absolute()
    async with _locked(store, report):
        _remove_unfinished(store)
        await _ensure(store, _kernel(), _build_kernel, report)
        await _ensure(store, _guest(), _build_guest, report)
        await _ensure(store, _initramfs(), lambda into: _build_initramfs(store, into), report)
        for name in dict.fromkeys([BASE, *images]):
            await _ensure(store, _image(name), partial(_build_image, name), report)


@asynccontextmanager
async def _locked(store: Path, report: Report) -> AsyncIterator[None]:
    with _open_lock(store) as lock:
        told = False
        while not _try_lock(lock):
            if not told:
                report(f"waiting for another setup to end in {store}")
            told = True
            await asyncio.sleep(_LOCK_RETRY_S)
        yield


def _open_lock(store: Path) -> IO[str]:
    try:
        store.mkdir(parents=True, exist_ok=True)
        # Kernel and images are opened by the VMs' own users.
        store.chmod(0o755)
        check_reachable(store, "asset store", "SANDMARTIN_ASSETS_DIR")
        return (store / "lock").open("a")
    except PermissionError as error:
        raise ToolFailed(
            f"{store} cannot be written",
            hint="run `sudo sandmartin setup`, or set SANDMARTIN_ASSETS_DIR",
        ) from error


def _try_lock(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_unfinished(store: Path) -> None:
    """Remove what setups that were killed left; the lock is held, so nobody works on it."""
    for left in store.glob(".*-*"):
        shutil.rmtree(left)


async def _ensure(
    store: Path, name: str, build: Callable[[Path], Awaitable[None]], report: Report
) -> None:
    """Build an entry if it is not there, whole or not at all."""
    if (store / name).is_dir():
        report(f"{name}: present")
        return
    report(f"{name}: building")
    began = time.monotonic()
    beside = store / f".{name}.{random_id(6)}"
    beside.mkdir()
    try:
        await build(beside)
        beside.chmod(0o755)
        # An entry is never looked into again, so a power cut must not leave it half written.
        await asyncio.to_thread(os.sync)
        beside.rename(store / name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    report(f"{name}: built in {time.monotonic() - began:.1f} s")


async def _bootstrap(*options: str | Path) -> None:
    command = ["mmdebstrap", "--quiet", "--mode=root", *options]
    try:
        await proc.run(command, deadline_s=_BUILD_DEADLINE_S)
    except ToolFailed as error:
        raise ToolFailed(
            error.message, hint="Debian's package mirror must be reachable; then run setup again"
        ) from error


async def _build_kernel(into: Path) -> None:
    # apt verifies the package by the suite's signature. It is unpacked and never installed.
    root, unpacked = into / "root", into / "unpacked"
    fetch = (
        f"cd {shlex.quote(os.fspath(into))} && export APT_CONFIG=$MMDEBSTRAP_APT_CONFIG && "
        f"apt-get -q download $(apt-cache depends {_KERNEL_PACKAGE} | "
        "sed -n 's/^ *Depends: \\(linux-image\\)/\\1/p')"
    )
    await _bootstrap("--variant=custom", f"--customize-hook={fetch}", SUITE, root)
    package = _only(into, "linux-image-*.deb")
    await proc.run(["dpkg-deb", "--extract", package, unpacked], deadline_s=300)
    image = _only(unpacked, "boot/vmlinuz-*")
    modules = _only(unpacked, "lib/modules/*")
    # A package that is only unpacked has not had depmod run over it.
    await proc.run(["depmod", "-b", unpacked, modules.name], deadline_s=60)
    _collect_modules(modules, into / "modules")
    _install(image, into / "vmlinuz")
    (into / "release").write_text(image.name.removeprefix("vmlinuz-") + "\n")
    for leftover in (root, unpacked):
        shutil.rmtree(leftover, ignore_errors=True)
    package.unlink()


def _only(directory: Path, pattern: str) -> Path:
    found = list(directory.glob(pattern))
    if len(found) != 1:
        raise ToolFailed(f"{len(found)} files match {pattern} in {directory}; one was expected")
    return found[0]


def _install(source: Path, target: Path, mode: int = 0o444) -> None:
    shutil.copyfile(source, target)
    target.chmod(mode)


def module_order(depends: str, wanted: Iterable[str]) -> list[str]:
    """Paths of the wanted modules and all they need, each after what it needs.

    `depends` is the text of modules.dep (depmod(8)): `path: needed needed ...`, where what is
    needed stands in the order in which it has to be unloaded.
    """
    needs: dict[str, list[str]] = {}
    for line in depends.splitlines():
        key, _, rest = line.partition(":")
        needs[key] = rest.split()
    by_name = {Path(path).name.partition(".")[0].replace("-", "_"): path for path in needs}
    ordered: list[str] = []
    for name in wanted:
        path: str | None = by_name.get(name.replace("-", "_"))
        if path is None:
            continue  # built into the kernel
        for each in (*reversed(needs[path]), path):
            if each not in ordered:
                ordered.append(each)
    return ordered


def _collect_modules(source: Path, target: Path) -> None:
    target.mkdir()
    names = []
    for path in module_order((source / "modules.dep").read_text(), _MODULES):
        content = (source / path).read_bytes()
        if path.endswith(".xz"):
            content = lzma.decompress(content)
        names.append(Path(path).name.partition(".")[0] + ".ko")
        (target / names[-1]).write_bytes(content)
    (target / "order").write_text("".join(f"{name}\n" for name in names))


async def _build_guest(into: Path) -> None:
    target = into / "sandmartin-guest"
    packed = _PACKED / "sandmartin-guest"
    if packed.exists():
        _install(packed, target, 0o555)
        return
    beside = Path(sys.executable).parent / "go"
    go = os.fspath(beside) if beside.exists() else "go"
    env = {name: os.environ[name] for name in os.environ if name.startswith("GO")}
    env |= {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly -buildvcs=false"}
    command = [go, "build", "-trimpath", "-ldflags=-s -w", "-o", os.fspath(target)]
    command += ["./cmd/sandmartin-guest"]
    try:
        await proc.run(command, cwd=_GUEST_SOURCES, env=env, deadline_s=_BUILD_DEADLINE_S)
    except ToolFailed as error:
        raise ToolFailed(
            error.message, hint="Go comes with scripts/setup; its modules must be reachable"
        ) from error
    target.chmod(0o555)


async def _build_initramfs(store: Path, into: Path) -> None:
    modules = store / _kernel() / "modules"
    files = {path.name: path.read_bytes() for path in sorted(modules.iterdir())}
    guest = (store / _guest() / "sandmartin-guest").read_bytes()
    members = [Member(name, stat.S_IFDIR | 0o755) for name in ("dev", "proc", "sys", "modules")]
    members.append(Member("newroot", stat.S_IFDIR | 0o755))
    members.append(Member("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)))
    members.append(Member("init", stat.S_IFREG | 0o755, guest))
    members += [Member(f"modules/{n}", stat.S_IFREG | 0o644, c) for n, c in files.items()]
    # Not compressed: under emulation unpacking would cost more than reading.
    target = into / "initramfs.cpio"
    target.write_bytes(b"".join(archive(members)))
    target.chmod(0o444)


@dataclass(frozen=True)
class Member:
    """One file of a cpio archive; `mode` has the file type bits, `device` major and minor."""

    name: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def archive(members: Iterable[Member]) -> Iterator[bytes]:
    """A cpio archive in the `newc` format (initramfs-buffer-format in the kernel's documentation).

    The same members give the same bytes.
    """
    for number, member in enumerate((*members, Member("TRAILER!!!", 0)), 1):
        name = member.name.encode() + b"\0"
        # ino mode uid gid nlink mtime size devmajor devminor rdevmajor rdevminor namesize check
        values = [number, member.mode, 0, 0, 1, 0, len(member.content), 0, 0, *member.device]
        header = b"070701" + b"".join(b"%08X" % value for value in [*values, len(name), 0])
        yield _padded(header + name)
        yield _padded(member.content)


def _padded(block: bytes) -> bytes:
    return block + b"\0" * (-len(block) % 4)


async def _build_image(name: str, into: Path) -> None:
    root, recipe = into / "root", _recipes() / name
    image = into / "rootfs.ext4"
    names = _chain(name)
    recipes = [_recipes() / each for each in names]
    include = [word for each in recipes for word in _words(each / "packages")]
    options = ["--variant=minbase" if BASE in names else "--variant=custom"]
    options += [f"--include={','.join(include)}"] if include else []
    with tempfile.TemporaryDirectory(dir=into) as fetched:
        if (locked := recipe / "requirements.txt").exists():
            await wheels.fetch(locked, Path(fetched))
            # The image's own pip reads them.
            Path(fetched).chmod(0o755)  # noqa: ASYNC240
            options.append(f"--customize-hook=copy-in {shlex.quote(fetched)} /")
            options.append(f'--customize-hook=mv "$1/{Path(fetched).name}" "$1/wheels"')
        for each in recipes:
            hook = shlex.quote(os.fspath(each / "customize"))
            options.append(f'--customize-hook={hook} "$1"')
        await _bootstrap(*options, SUITE, root)
    await make_file_system(root, image)
    image.chmod(0o444)
    manifest = {"suite": SUITE, "packages": _installed(root), "built_at": int(time.time())}
    (into / "manifest.json").write_text(json.dumps(manifest, indent=1))
    traits.install(recipe, into)
    shutil.rmtree(root)


def _chain(name: str) -> list[str]:
    """An image and those that it stands on, the lowest first."""
    return [*(each for below in _below(name) for each in _chain(below)), name]


def _words(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []


def _installed(root: Path) -> dict[str, str]:
    status, found, name = (root / "var/lib/dpkg/status").read_text(), {}, ""
    for line in status.splitlines():
        key, _, value = line.partition(": ")
        if key == "Package":
            name = value
        elif key == "Version":
            found[name] = value
    return found


if __name__ == "__main__":
    asyncio.run(setup(Settings.load(), lambda line: print(line, file=sys.stderr)))
