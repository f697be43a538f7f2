"""Opening a slot's tap device for a VM.

The agent opens it and hands the descriptor on: the VM's user then needs no right to /dev/net/tun,
which on hosts without udev is root's alone.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import threading
from pathlib import Path

from sandmartin.errors import ToolFailed

_DEVICE = "/dev/net/tun"
_CLONE_NEWNET = 0x40000000
# linux/if_tun.h
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_NAME_LIMIT = 15


def open_tap(netns: Path, name: str) -> int:
    """A descriptor of the existing tap `name` in the network namespace `netns`. Blocks shortly.

    Raises ToolFailed.
    """
    outcome: list[int | OSError] = []

    # A thread enters the namespace and ends there: it must not be one that anybody uses again.
    def enter() -> None:
        try:
            outcome.append(_open_there(netns, name))
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=enter, name=f"tap {name}")
    thread.start()
    thread.join()
    (result,) = outcome
    if isinstance(result, OSError):
        raise ToolFailed(
            f"the tap {name} in {netns} cannot be opened: {result.strerror}"
        ) from result
    return result


def _open_there(netns: Path, name: str) -> int:
    namespace = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(namespace)
    # Asking for a name that is not there would make a new tap, so look first.
    if not _listed(name):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
    tap = os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode()[:_NAME_LIMIT], flags))
    except OSError:
        os.close(tap)
        raise
    return tap


def _listed(name: str) -> bool:
    """Whether the calling thread's network namespace has the device `name`."""
    lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    return any(line.partition(":")[0].strip() == name for line in lines)
