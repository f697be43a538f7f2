"""What a host has to make sandboxes with, put together and taken apart in reverse order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from sandmartin.agent.assets import Assets
from sandmartin.agent.claims import Claims
from sandmartin.agent.disk import ImageStore
from sandmartin.agent.guest import Deadlines, Guest
from sandmartin.agent.journal import DataDir
from sandmartin.agent.limits import ControlGroups
from sandmartin.agent.memory import BaseStore
from sandmartin.agent.metrics import Sampler
from sandmartin.agent.network import Network
from sandmartin.agent.network.slot import GATEWAY_IP, GATEWAY_MAC, GUEST_IP, PREFIX_LENGTH
from sandmartin.agent.snapshots import Platform, Signer, Snapshots
from sandmartin.agent.storage import Storage
from sandmartin.agent.tasks import Tasks
from sandmartin.agent.vmm import Vmm
from sandmartin.agent.vmm.accel import choose_accel
from sandmartin.agent.vmm.qemu import Qemu, machine_type
from sandmartin.model import Accel, Settings

_log = logging.getLogger(__name__)


class GuestFactory(Protocol):
    """Makes the client of a guest agent from its address, port and access token."""

    def __call__(self, address: str, token: str) -> Guest: ...


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How often and how long a host waits for what may yet come right."""

    #: A guest that fails this many health checks in a row is given up.
    health_tries: int = 3
    health_deadline_s: float = 5.0
    #: Between two checks: one that is refused at once says little.
    health_pause_s: float = 1.0
    #: How often sandboxes that stand still for want of disk space are looked at.
    disk_check_s: float = 2.0
    #: How old the last activity on disk may be, which is all that a killed agent leaves of it.
    activity_save_s: float = 15.0
    #: How often sandboxes that have idled past their time are looked for.
    reap_s: float = 1.0
    #: How long nothing may have happened before a pool is filled, and how long that is waited for.
    quiet_s: float = 0.2
    quiet_limit_s: float = 5.0
    #: How long nothing must have been asked of the host before something is folded.
    fold_s: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a host has to make sandboxes with."""

    settings: Settings
    data: DataDir
    images: ImageStore
    network: Network
    groups: ControlGroups
    vmm: Vmm
    accel: Accel
    kernel: Path
    initramfs: Path
    tasks: Tasks
    storage: Storage
    bases: BaseStore
    platform: Platform
    sampler: Sampler = field(default_factory=Sampler)
    guest: GuestFactory = Guest
    patience: Patience = Patience()
    #: Called with the name of each step of an operation once it is done.
    step: Callable[[str], None] = lambda _: None

    @property
    def command_line(self) -> str:
        """What our init finds on the kernel's command line: the same in every slot."""
        guest = f"sandmartin.addr={GUEST_IP}/{PREFIX_LENGTH}"
        return f"{guest} sandmartin.gateway={GATEWAY_IP} sandmartin.gateway-mac={GATEWAY_MAC}"


@contextlib.asynccontextmanager
async def open_machine(settings: Settings) -> AsyncIterator[Machine]:
    """The parts of one agent, its data directory locked for as long.

    Raises NotFound when setup has not been run, Conflict when the directory is in use.
    """
    assets = await asyncio.to_thread(Assets.find, settings)
    data = DataDir(settings.data_dir)
    await asyncio.to_thread(data.open)
    with contextlib.closing(data):
        qemu = Qemu()
        choice = await choose_accel(
            settings.accel, assets.kernel, assets.initramfs, settings.assets_dir, qemu=qemu
        )
        _log.info("accelerator %s: %s", choice.accel, choice.reason)
        installation = await qemu.installation()
        signer = await asyncio.to_thread(Signer.open, settings.assets_dir / "platform.key")
        tasks = Tasks()
        bases = BaseStore(
            in_memory=not installation.reads_bases, budget_bytes=settings.base_budget_mb << 20
        )
        yield Machine(
            settings=settings,
            data=data,
            images=ImageStore(data.images, assets.images),
            network=Network(
                settings, Claims(settings.run_dir, data.instance_id, settings.data_dir), tasks
            ),
            groups=ControlGroups(data.instance_id),
            vmm=qemu,
            accel=choice.accel,
            kernel=assets.kernel,
            initramfs=assets.initramfs,
            tasks=tasks,
            storage=Storage(data, Snapshots(signer), settings.layers_uid),
            bases=bases,
            platform=Platform(
                vmm_version=installation.version.text,
                machine=machine_type(choice.accel),
                accel=choice.accel,
                tsc_khz=await qemu.tsc_khz() if choice.accel is Accel.TCG else 0,
            ),
            guest=partial(Guest, deadlines=Deadlines(stream_s=settings.guest_silence_s)),
        )
        await bases.close()
