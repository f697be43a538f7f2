"""Work in another network namespace, without moving the process there.

A namespace belongs to a thread. Each piece of work gets a thread of its own that enters and ends
there, so no thread that is used again is ever in the wrong place.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")

#: Where iproute2 and pyroute2 keep named namespaces.
DIRECTORY = Path("/run/netns")
_CLONE_NEWNET = 0x40000000


def path_of_slot(instance_id: str, number: int) -> Path:
    """The namespace of an agent's slot."""
    return DIRECTORY / f"sandmartin-{instance_id}-{number}"


def run_inside(netns: Path, work: Callable[[], _T]) -> _T:
    """The result of `work` done in the namespace `netns`. Blocks; raises what `work` raises.

    Raises OSError when the namespace cannot be entered.
    """

    def enter() -> _T:
        namespace = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _call("setns", namespace, _CLONE_NEWNET)
        finally:
            os.close(namespace)
        return work()

    return _in_own_thread(enter)


def run_in_new(work: Callable[[int], _T]) -> _T:
    """The result of `work` done in a new namespace.

    `work` is given the thread's id: it must attach the namespace to a name, or it ends.
    """

    def enter() -> _T:
        _call("unshare", _CLONE_NEWNET)
        return work(threading.get_native_id())

    return _in_own_thread(enter)


async def inside(netns: Path, work: Callable[[], _T]) -> _T:
    """`run_inside`, without blocking the event loop."""
    return await asyncio.to_thread(run_inside, netns, work)


def _in_own_thread(work: Callable[[], _T]) -> _T:
    results: list[_T] = []
    errors: list[BaseException] = []

    def attempt() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001  # raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=attempt, name="namespace")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _call(function: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc[function](*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
