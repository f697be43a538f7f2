"""The leak check: everything on this machine that carries an agent's marks.

It looks at the machine itself and asks the agent nothing, so it also sees what the agent forgot.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from pyroute2 import IPRoute

_CGROUPS = Path("/sys/fs/cgroup")


def find(instance_id: str, data_dir: Path, run_dir: Path) -> set[str]:
    """All that an agent has on this machine: its VMs' and its own, ready slots left out."""
    found = set(_processes(data_dir))
    found |= {f"sandbox directory {path}" for path in data_dir.glob("sandboxes/*")}
    found |= {f"control group {path}" for path in _groups(instance_id)}
    return found | set(_mounts(data_dir))


def find_all(instance_id: str, data_dir: Path, run_dir: Path) -> set[str]:
    """The same with what only the end of the agent removes: slots, rules, groups."""
    found = find(instance_id, data_dir, run_dir)
    found |= {f"namespace {path}" for path in Path("/run/netns").glob(f"*-{instance_id}-*")}
    with IPRoute() as routes:
        names = [str(link.get("ifname")) for link in routes.get_links()]
    found |= {f"link {name}" for name in names if name.startswith(f"sm{instance_id}")}
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True)
    found |= {f"nft {line}" for line in tables.stdout.splitlines() if instance_id in line}
    found |= {f"control group {path}" for path in _own_groups(instance_id)}
    return found | {f"slot claim {path}" for path in run_dir.glob("slots/*")}


def _processes(data_dir: Path) -> Iterator[str]:
    mark = os.fsencode(data_dir)
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        try:
            words = (process / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if mark in words:
            # By what it names and not by its number: a sandbox that was paused has another one.
            where = next(word for word in words.split(b"\0") if mark in word)
            yield f"process of {os.fsdecode(where)}"


def _groups(instance_id: str) -> list[Path]:
    below = (path for own in _own_groups(instance_id) for path in own.iterdir())
    return [path for path in below if path.is_dir()]


def _own_groups(instance_id: str) -> list[Path]:
    """The agent's own, one in each hierarchy. Those of others come and go meanwhile."""
    name = f"sandmartin-{instance_id}"
    return [Path(where, name) for where, below, _ in os.walk(_CGROUPS) if name in below]


def _mounts(data_dir: Path) -> Iterator[str]:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        if str(data_dir) in line:
            yield f"mount {line}"
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        if str(data_dir) in backing.read_text():
            yield f"loop device {backing}"
