"""What the host tells of where the time of its operations went."""

from __future__ import annotations

import time

import pytest

from sandmartin.agent.host import Host
from sandmartin.agent.sandbox import Sandbox
from tests.fakes_agent import make_spec

pytestmark = pytest.mark.qemu_img


def names(sandbox: Sandbox) -> list[str]:
    return [each.name for each in sandbox.phases]


async def test_each_operation_tells_its_phases(host: Host) -> None:
    began_at = time.monotonic()
    sandbox = await host.create(make_spec(), {})
    took_s = time.monotonic() - began_at
    told_s = sum(each.duration_s for each in sandbox.phases)
    assert took_s / 2 < told_s <= took_s
    assert {"slot", "vmm", "boot"} <= set(names(sandbox))
    assert names(sandbox).index("slot") < names(sandbox).index("boot")

    await host.pause("sb1")
    assert {"freeze", "write", "end"} <= set(names(sandbox))
    await host.resume("sb1", None)
    assert {"vmm", "restore", "guest"} <= set(names(sandbox))
    assert not {"write", "boot"} & set(names(sandbox))

    checkpoint = await host.checkpoint("sb1", "")
    assert {"freeze", "write"} <= set(names(sandbox))
    await host.rollback("sb1", checkpoint.path.name)
    assert {"end", "restore", "guest"} <= set(names(sandbox))
    (child,) = await host.fork("sb1", ["sb2"], None)
    assert isinstance(child, Sandbox)
    # It waits for its source to be frozen, and begins then.
    assert names(child).index("freeze") < names(child).index("restore")


async def test_what_runs_already_tells_nothing_of_before(host: Host) -> None:
    sandbox = await host.create(make_spec(), {})
    await host.resume("sb1", None)
    assert not set(names(sandbox)) - {"turn"}
