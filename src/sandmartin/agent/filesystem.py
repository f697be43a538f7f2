"""Root file systems: a tree of files becomes a sparse ext4 image."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from sandmartin.agent import proc
from sandmartin.model import DEFAULT_DISK_SIZE_MB

#: Runs a program to its end, within so many seconds. Raises ToolFailed when it exits other than 0.
Run = Callable[[Sequence[str | os.PathLike[str]], float], Awaitable[object]]


async def _plainly(argv: Sequence[str | os.PathLike[str]], deadline_s: float) -> object:
    return await proc.run(argv, deadline_s=deadline_s)


async def make_file_system(root: Path, image: Path, run: Run = _plainly) -> None:
    """Make `image`, of a default disk's size, of the tree below `root`, and check it.

    `run` says where the programs run. Raises ToolFailed, TimedOut.
    """
    # The guest would otherwise zero the inode tables in the background, at its own cost.
    options = ["-q", "-F", "-t", "ext4", "-L", "root", "-J", "size=32", "-m", "1"]
    options += ["-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"]
    await run(["mke2fs", *options, "-d", root, image, f"{DEFAULT_DISK_SIZE_MB}M"], 600)
    await run(["e2fsck", "-fn", image], 300)
