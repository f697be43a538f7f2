"""The content of guest RAM outside a running VM.

A *base* is a sparse file with a whole RAM in it; VMs map it privately, so that what a VM dirtied
is what the kernel copied for it. A *diff* holds those pages. What must stay true:

- a base is never written again once it stands;
- a diff is cumulative: one base and at most one diff make a RAM;
- a restored RAM is byte for byte the frozen one; a page that was zeroed is a dirtied page and
  comes back as zero;
- what is loaded was verified against a checksum that its owner kept elsewhere.

The VM must stand still while its pages are scanned and copied; this package never stops one.
"""

from sandmartin.agent.memory.base import (
    Base,
    Check,
    create_empty_base,
    digest_base,
    dump_base,
    get_base,
)
from sandmartin.agent.memory.diff import Diff, Written, fold, inject, open_diff, write_diff
from sandmartin.agent.memory.ram import Buffer, FileId, Ram
from sandmartin.agent.memory.runs import PAGE, Runs
from sandmartin.agent.memory.store import BaseStore, Lease

__all__ = [
    "PAGE",
    "Base",
    "BaseStore",
    "Buffer",
    "Check",
    "Diff",
    "FileId",
    "Lease",
    "Ram",
    "Runs",
    "Written",
    "create_empty_base",
    "digest_base",
    "dump_base",
    "fold",
    "get_base",
    "inject",
    "open_diff",
    "write_diff",
]
