"""What the agent keeps on disk: its data directory, and one journal entry per sandbox.

An entry is written whole beside the old one and renamed over it, so a reader sees the old state
or the new one and never a mixture. It is written *before* a thing is acquired or given up, so
after a crash the next start knows what may exist and owns its removal. Entries hold the guest's
access token and are readable by root alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandmartin.agent import files
from sandmartin.agent.memory import FileId
from sandmartin.agent.proc import ProcessId
from sandmartin.agent.vmm import VmRecord
from sandmartin.errors import Conflict, Invalid
from sandmartin.model import (
    INTERNET,
    Accel,
    NetworkPolicy,
    SandboxSpec,
    State,
    check_name,
    random_id,
)

FORMAT = 1
INSTANCE = "instance.json"
_ENTRY = "journal.json"


def write_whole(path: Path, content: bytes, *, mode: int = 0o600, sync: bool = False) -> None:
    """Replace `path` by `content` in one step; with `sync` it survives a power cut."""
    beside = path.with_name(f".{path.name}.{random_id(6)}")
    try:
        with open(beside, "xb", opener=lambda p, flags: os.open(p, flags, mode)) as out:
            out.write(content)
            if sync:
                out.flush()
                os.fsync(out.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if sync:
        files.sync(path.parent)


def check_reachable(path: Path, what: str, setting: str) -> None:
    """Raises Invalid when the VMs' users cannot reach `path`, whose parents are not ours."""
    for parent in path.resolve().parents:
        if not parent.stat().st_mode & 0o001:
            raise Invalid(
                f"{what} {path} cannot be used: {parent} is closed to other users, and every VM"
                " runs as a user of its own",
                hint=f"choose another with {setting}, or `chmod o+x {parent}`",
            )


@dataclass(frozen=True)
class SandboxDir:
    """The paths of one sandbox."""

    path: Path

    @property
    def entry(self) -> Path:
        return self.path / _ENTRY

    def layer(self, name: str) -> Path:
        """A disk layer of the sandbox's own, not sealed yet."""
        return self.path / f"{name}.qcow2"

    @property
    def paused(self) -> Path:
        """The snapshot it sleeps in while it is paused."""
        return self.path / "paused"

    @property
    def checkpoints(self) -> Path:
        """The snapshots of its own history."""
        return self.path / "checkpoints"

    @property
    def vm(self) -> Path:
        """Sockets and logs of the VM, closed to the VM's own user."""
        return self.path / "vm"


@dataclass(frozen=True)
class RamRecord:
    """Where the RAM of a running VM comes from, to find it again."""

    #: Checksum of its base.
    base: str
    #: What the VM maps.
    file: FileId


@dataclass(frozen=True, kw_only=True)
class Entry:
    """All that must be known of a sandbox to adopt it or to clean up after it."""

    spec: SandboxSpec
    state: State
    created_at: float
    last_active_at: float
    reason: str = ""
    #: Slot number; None before one is taken and after it was given back.
    slot: int | None = None
    #: The VM's control group; empty for the sandbox's own name.
    group: str = ""
    vm: VmRecord | None = None
    ram: RamRecord | None = None
    #: The raw image below its disk; None before it has a disk.
    image: Path | None = None
    #: Sealed layers over the image, the lowest first.
    layers: tuple[str, ...] = ()
    #: The layer it writes to, and the one it is about to write to instead.
    top: str = ""
    next_top: str = ""
    #: Snapshot it sleeps in while it is paused, below its directory; empty when only its disk is.
    sleeps_in: str = ""
    #: Of the host, when its VM was started.
    boot_id: str = ""
    #: Environment of every command.
    envs: Mapping[str, str] = field(default_factory=dict, repr=False)
    #: Paused by the reaper, and not yet told to the control plane.
    auto_paused: bool = False
    #: The guest has confirmed who it is since its VM was last started or stood still.
    introduced: bool = True
    #: It was set back, and the guest has not been told so yet.
    moved: bool = False
    #: The image that its disk is being made; once that is there, the sandbox is to be removed.
    flattens_to: Path | None = None
    #: Version of the protocol that its guest agent speaks; empty until that has said so.
    envd_version: str = ""
    #: Access token of the guest agent.
    token: str = field(default="", repr=False)

    @property
    def network(self) -> NetworkPolicy:
        """What it may reach."""
        return self.spec.network or INTERNET

    def to_json(self) -> bytes:
        vm, ram, policy = self.vm, self.ram, self.spec.network
        return json.dumps(
            {
                "format": FORMAT,
                "spec": vars(self.spec) | {"network": policy and policy.to_dict()},
                "state": self.state,
                "created_at": self.created_at,
                "last_active_at": self.last_active_at,
                "reason": self.reason,
                "slot": self.slot,
                "group": self.group,
                "image": self.image and os.fspath(self.image),
                "layers": self.layers,
                "top": self.top,
                "next_top": self.next_top,
                "sleeps_in": self.sleeps_in,
                "boot_id": self.boot_id,
                "envs": dict(self.envs),
                "auto_paused": self.auto_paused,
                "introduced": self.introduced,
                "moved": self.moved,
                "flattens_to": self.flattens_to and os.fspath(self.flattens_to),
                "envd_version": self.envd_version,
                "token": self.token,
                "ram": ram and {"base": ram.base, "file": [ram.file.device, ram.file.inode]},
                "vm": vm
                and {
                    "pid": vm.process.pid,
                    "start_ticks": vm.process.start_ticks,
                    "run_dir": os.fspath(vm.run_dir),
                    "vmm_version": vm.vmm_version,
                    "machine": vm.machine,
                    "accel": vm.accel,
                    "memory_mb": vm.memory_mb,
                },
            },
            indent=1,
        ).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Entry:
        """Parse an entry. Raises Conflict for one of another version, Invalid for anything else."""
        try:
            raw: dict[str, Any] = json.loads(content)
            if raw["format"] != FORMAT:
                raise Conflict(
                    f"journal format {raw['format']!r} is not {FORMAT}",
                    hint="run the version of Sandmartin that wrote it",
                )
            vm, ram = raw["vm"], raw["ram"]
            return cls(
                spec=_spec(raw["spec"]),
                state=State(raw["state"]),
                created_at=float(raw["created_at"]),
                last_active_at=float(raw["last_active_at"]),
                reason=raw["reason"],
                slot=raw["slot"],
                group=raw.get("group", ""),
                image=Path(raw["image"]) if raw["image"] else None,
                layers=tuple(raw["layers"]),
                top=raw["top"],
                next_top=raw["next_top"],
                sleeps_in=raw["sleeps_in"],
                boot_id=raw["boot_id"],
                envs=raw["envs"],
                auto_paused=raw["auto_paused"],
                # Entries of the first release have none of these.
                introduced=raw.get("introduced", True),
                moved=raw.get("moved", False),
                flattens_to=Path(raw["flattens_to"]) if raw.get("flattens_to") else None,
                envd_version=raw.get("envd_version", ""),
                token=raw["token"],
                ram=RamRecord(ram["base"], FileId(*ram["file"])) if ram else None,
                vm=vm
                and VmRecord(
                    process=ProcessId(vm["pid"], vm["start_ticks"]),
                    run_dir=Path(vm["run_dir"]),
                    vmm_version=vm["vmm_version"],
                    machine=vm["machine"],
                    accel=Accel(vm["accel"]),
                    memory_mb=vm["memory_mb"],
                ),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # Not the error's own text: it may quote the entry, which holds the token.
            raise Invalid(f"journal entry cannot be read: {type(error).__name__}") from None


def _spec(raw: Mapping[str, Any]) -> SandboxSpec:
    # Entries of the first release have no policy.
    policy = raw.get("network")
    return SandboxSpec(**{**raw, "network": policy and NetworkPolicy.from_dict(policy)})


class DataDir:
    """One agent's data directory: locked while open; its instance id marks all the agent makes."""

    def __init__(self, path: Path) -> None:
        # Layers name their images by path, and VMs live in another working directory.
        self.path = path.absolute()
        self.instance_id = ""
        self._lock: int | None = None

    @property
    def sandboxes(self) -> Path:
        return self.path / "sandboxes"

    @property
    def images(self) -> Path:
        return self.path / "images"

    @property
    def templates(self) -> Path:
        """Snapshots that sandboxes start from, by name."""
        return self.path / "templates"

    @property
    def forks(self) -> Path:
        """Snapshots that live as long as a fork takes."""
        return self.path / "forks"

    @property
    def waiting(self) -> Path:
        """Sockets and logs of VMs that were started ahead."""
        return self.path / "waiting"

    @property
    def layers(self) -> Path:
        """Sealed disk layers, shared."""
        return self.path / "layers"

    @property
    def bases(self) -> Path:
        """Bases of RAM, shared, each named by its checksum."""
        return self.path / "bases"

    @property
    def blobs(self) -> Path:
        """Layers of images of registries, to be used again."""
        return self.path / "blobs"

    def open(self) -> None:
        """Create what is missing, take the lock, read the instance id.

        Raises Conflict when another agent holds the directory, Invalid when the VMs' users could
        not reach it or it is not one of ours.
        """
        # Other users may pass, to read an image or, as the layers' owner, a layer; none may list.
        shared = (self.images, self.layers, self.templates, self.forks, self.bases)
        for path in (self.path, self.sandboxes, self.waiting, *shared):
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o711)
        self.blobs.mkdir(mode=0o700, exist_ok=True)
        check_reachable(self.path, "data directory", "--data-dir")
        lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise Conflict(
                f"another agent is running on {self.path}",
                hint="use it, end it first, or give this one another --data-dir",
            ) from None
        self._lock = lock
        try:
            self.instance_id = self._read_instance_id()
        except BaseException:
            self.close()
            raise

    def _read_instance_id(self) -> str:
        file = self.path / INSTANCE
        with contextlib.suppress(FileNotFoundError):
            try:
                return check_name(json.loads(file.read_bytes())["id"], "instance id")
            except (KeyError, TypeError, ValueError) as error:
                raise Invalid(f"{file} is damaged: {error!r}") from error
        instance_id = random_id(6)
        write_whole(file, json.dumps({"id": instance_id, "format": FORMAT}).encode(), sync=True)
        return instance_id

    def close(self) -> None:
        """Give up the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def sandbox(self, sandbox_id: str) -> SandboxDir:
        """The paths of a sandbox; the id has passed `check_name`."""
        return SandboxDir(self.sandboxes / sandbox_id)

    def create(self, entry: Entry) -> SandboxDir:
        """Make the directory of a new sandbox with its first entry in it. Raises DiskFull."""
        paths = self.sandbox(entry.spec.sandbox_id)
        with files.space_errors(paths.path):
            paths.path.mkdir(mode=0o700)
            try:
                self.write(entry)
                paths.vm.mkdir(mode=0o700)
            except BaseException:
                shutil.rmtree(paths.path, ignore_errors=True)
                raise
        return paths

    def rename(self, sandbox_id: str, new_id: str) -> None:
        """A sandbox gets another id; its entry, which still has the old one, is to be written.

        Until then it belongs to nobody.
        """
        self.sandbox(sandbox_id).path.rename(self.sandbox(new_id).path)

    def write(self, entry: Entry, *, sync: bool = False) -> None:
        """Record an entry; with `sync` it survives a power cut. Raises DiskFull."""
        path = self.sandbox(entry.spec.sandbox_id).entry
        with files.space_errors(path):
            write_whole(path, entry.to_json(), sync=sync)

    def remove(self, sandbox_id: str) -> None:
        """Remove all files of a sandbox, its entry last. Idempotent."""
        paths = self.sandbox(sandbox_id)
        with contextlib.suppress(FileNotFoundError):
            for child in paths.path.iterdir():
                if child.name == _ENTRY:
                    continue
                if child.is_dir() and not child.is_symlink():
                    shutil.rmtree(child)
                else:
                    child.unlink(missing_ok=True)
            paths.entry.unlink(missing_ok=True)
            paths.path.rmdir()

    def read_all(self) -> Iterator[tuple[str, Entry | None]]:
        """Every sandbox directory with its entry; None for one that holds no readable entry of its.

        Raises Conflict for an entry of another version: what it owns must not be taken for nothing.
        """
        for path in sorted(self.sandboxes.iterdir()):
            if not path.is_dir():
                continue
            entry = None
            with contextlib.suppress(FileNotFoundError, Invalid):
                entry = Entry.from_json((path / _ENTRY).read_bytes())
            # One that was about to get another id was nobody's yet.
            ours = entry is not None and entry.spec.sandbox_id == path.name
            yield path.name, entry if ours else None
