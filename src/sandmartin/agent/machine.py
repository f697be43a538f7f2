"""Putting an agent's parts together, and taking them apart in reverse order."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from functools import partial

from sandmartin.agent.assets import Assets
from sandmartin.agent.claims import Claims
from sandmartin.agent.disk import ImageStore
from sandmartin.agent.guest import Deadlines, Guest
from sandmartin.agent.journal import DataDir
from sandmartin.agent.limits import ControlGroups
from sandmartin.agent.network import Network
from sandmartin.agent.sandbox import Machine
from sandmartin.agent.tasks import Tasks
from sandmartin.agent.vmm.accel import choose_accel
from sandmartin.agent.vmm.qemu import Qemu
from sandmartin.model import Settings

_log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def open_machine(settings: Settings) -> AsyncIterator[Machine]:
    """The parts of one agent, its data directory locked for as long.

    Raises NotFound when setup has not been run, Conflict when the directory is in use.
    """
    assets = Assets.find(settings)
    data = DataDir(settings.data_dir)
    data.open()
    with contextlib.closing(data):
        choice = await choose_accel(
            settings.accel, assets.kernel, assets.initramfs, settings.assets_dir
        )
        _log.info("accelerator %s: %s", choice.accel, choice.reason)
        claims = Claims(settings.run_dir, data.instance_id, settings.data_dir)
        tasks = Tasks()
        yield Machine(
            settings=settings,
            data=data,
            images=ImageStore(data.images, assets.images),
            network=Network(settings, claims, tasks),
            groups=ControlGroups(data.instance_id),
            vmm=Qemu(),
            accel=choice.accel,
            kernel=assets.kernel,
            initramfs=assets.initramfs,
            tasks=tasks,
            guest=partial(Guest, deadlines=Deadlines(stream_s=settings.guest_silence_s)),
        )
