"""The asset store's own formats, checked against the tools that read them."""

from __future__ import annotations

import stat
from pathlib import Path

from sandmartin.agent.assets import Member, archive, module_order


def test_archive_is_padded_and_repeatable() -> None:
    members = [
        Member("modules", stat.S_IFDIR | 0o755),
        Member("modules/order", stat.S_IFREG | 0o644, b"virtio.ko\n"),
        Member("init", stat.S_IFREG | 0o755, b"x" * 1027),
    ]
    content = b"".join(archive(members))
    assert content == b"".join(archive(members))
    assert content.startswith(b"070701")
    assert len(content) % 4 == 0
    assert b"TRAILER!!!" in content[-64:]
    assert content.index(b"virtio.ko\n") > content.index(b"modules/order")


def test_modules_follow_what_they_need() -> None:
    depends = (
        "drivers/virtio_ring.ko:\n"
        "drivers/virtio.ko: drivers/virtio_ring.ko\n"
        "net/virtio-net.ko.xz: net/failover.ko drivers/virtio.ko drivers/virtio_ring.ko\n"
        "net/failover.ko:\n"
    )
    assert module_order(depends, ["virtio_net", "built_in"]) == [
        "drivers/virtio_ring.ko",
        "drivers/virtio.ko",
        "net/failover.ko",
        "net/virtio-net.ko.xz",
    ]
