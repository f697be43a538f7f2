"""What is shared below VMs: none can change it, and nothing that is not ours is ever loaded."""

from __future__ import annotations

import ctypes
import json
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sandmartin.agent.journal import DataDir, Entry
from sandmartin.agent.snapshots import Signer
from sandmartin.errors import Conflict, Invalid, SandmartinError
from tests.vm.conftest import RunningAgent, execute

_PIDFD_GETFD = 438
#: Tries to change the file behind each descriptor in argv, by it and by opening it anew; in case
#: of success by what is there already. Prints which tries succeeded.
_ATTACK = """
import json, mmap, os, sys
def write(fd):
    os.pwrite(fd, os.pread(fd, 4096, 0), 0)
def map_shared(fd):
    mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE).close()
def resize(fd):
    os.ftruncate(fd, os.fstat(fd).st_size + 4096)
def chmod(fd):
    os.fchmod(fd, 0o666)
done = {}
for fd in map(int, sys.argv[1:]):
    held = {"held": fd}
    for access in (os.O_RDWR, os.O_WRONLY):
        try:
            held[f"opened {access}"] = os.open(f"/proc/self/fd/{fd}", access)
        except OSError:
            pass
    for how, each in held.items():
        for attack in (write, map_shared, resize, chmod):
            try:
                attack(each)
            except OSError:
                continue
            done.setdefault(fd, []).append(f"{attack.__name__} {how}")
print(json.dumps(done))
"""


async def call(agent: RunningAgent, method: str, **message: Any) -> dict[str, Any]:
    return await agent.transport._call(method, message, deadline_s=60)


def entry_of(agent: RunningAgent, sandbox_id: str) -> Entry:
    entry = dict(DataDir(agent.settings.data_dir).read_all())[sandbox_id]
    assert entry is not None
    return entry


@contextmanager
def files_of(pid: int) -> Iterator[dict[int, str]]:
    """The regular files that a process has open: our own descriptors of them, and their paths.

    The very ones it holds, as whoever took the process over would have them.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    taken: dict[int, str] = {}
    try:
        for path in Path(f"/proc/{pid}/fd").iterdir():
            if stat.S_ISREG(path.stat().st_mode):
                fd = libc.syscall(_PIDFD_GETFD, pidfd, int(path.name), 0)
                assert fd >= 0, os.strerror(ctypes.get_errno())
                taken[fd] = os.fspath(path.readlink())
        yield taken
    finally:
        for fd in (pidfd, *taken):
            os.close(fd)


def attack(files: dict[int, str], uid: int) -> dict[str, list[str]]:
    """What a process of the user `uid` that holds `files` can do to them."""
    as_user = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]
    done = subprocess.run(
        [*as_user, sys.executable, "-IS", "-c", _ATTACK, *map(str, files)],
        pass_fds=tuple(files),
        capture_output=True,
        timeout=30,
        check=True,
    )
    return {files[int(fd)]: tries for fd, tries in json.loads(done.stdout).items()}


async def test_vms_can_change_nothing_that_others_use(agent: RunningAgent) -> None:
    """Neither by the descriptors that the monitor holds nor by opening them anew."""
    async with agent.sandbox() as sandbox:
        name = sandbox.sandbox_id
        # Layers are sealed under the running VM, which had them open to write to: the one it was
        # started with, and one that it was given.
        for _ in range(2):
            await call(agent, "CreateCheckpoint", sandboxId=name)
        entry = entry_of(agent, name)
        assert entry.vm is not None and entry.image is not None and len(entry.layers) >= 3
        pid = entry.vm.process.pid
        uid = int(Path(f"/proc/{pid}/status").read_text().partition("Uid:")[2].split()[0])
        own = {f"{entry.top}.qcow2", "vmm.log", "qemu.log"}
        with files_of(pid) as files:
            shared = {fd: path for fd, path in files.items() if Path(path).name not in own}
            paths = {Path(path).name.removesuffix(" (deleted)") for path in shared.values()}
            assert {*(f"{each}.qcow2" for each in entry.layers), entry.image.name} <= paths
            assert any(each.startswith("memfd:sandmartin-base-") for each in paths) or any(
                each.endswith(".ram") for each in paths
            )
            assert attack(shared, uid) == {}
            # And the attack is one: its own layer can be written to.
            (top,) = (fd for fd, path in files.items() if Path(path).stem == entry.top)
            assert "write held" in attack({top: files[top]}, uid)[files[top]]
        assert (await execute(sandbox, "true")).exit_code == 0


@pytest.fixture(scope="module")
async def template(agent: RunningAgent) -> AsyncIterator[Path]:
    """A template's directory, made from a sandbox."""
    async with agent.sandbox() as sandbox:
        await call(agent, "CreateSnapshot", sandboxId=sandbox.sandbox_id, name="mine", live=True)
    yield agent.settings.data_dir / "templates" / "mine"
    await call(agent, "DeleteSnapshot", name="mine")


def _change_bytes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _change_manifest(path: Path, signer: Signer | None = None, **changes: object) -> None:
    signed = json.loads(path.read_bytes())
    manifest = json.loads(signed["manifest"])
    manifest["platform"] |= changes
    signed["manifest"] = json.dumps(manifest)
    if signer is not None:
        signed["signature"] = signer.sign(signed["manifest"].encode())
    path.write_text(json.dumps(signed))


async def test_snapshot_that_was_changed_or_is_of_another_clock_is_refused(
    agent: RunningAgent, template: Path
) -> None:
    ours = Signer.open(agent.settings.assets_dir / "platform.key")
    theirs = Signer(bytes(32))
    manifest, state, diff = (template / each for each in ("manifest.json", "state", "ram.diff"))
    platform = json.loads(json.loads(manifest.read_bytes())["manifest"])["platform"]
    tsc_khz = platform["tsc_khz"] or 2_000_000
    other = tsc_khz + tsc_khz // 1000
    cases: list[tuple[Path, Any, type[SandmartinError], str]] = [
        (manifest, lambda: _change_manifest(manifest, tsc_khz=other), Invalid, "not made by this"),
        (manifest, lambda: _change_manifest(manifest, theirs), Invalid, "not made by this"),
        (state, lambda: _change_bytes(state), Invalid, "damaged"),
        (diff, lambda: _change_bytes(diff), Invalid, "ram.diff"),
        (
            manifest,
            lambda: _change_manifest(manifest, ours, tsc_khz=other),
            Conflict,
            f"runs at {other} kHz",
        ),
    ]
    for path, change, kind, words in cases:
        before = path.read_bytes()
        change()
        with pytest.raises(kind, match=words):
            async with agent.sandbox(template="mine"):
                pass
        path.write_bytes(before)
    # As near as two hosts of one kind are.
    _change_manifest(manifest, ours, tsc_khz=tsc_khz + tsc_khz // 10000)
    async with agent.sandbox(template="mine") as sandbox:
        assert (await execute(sandbox, "true")).exit_code == 0
