"""The product as a user starts it: the command in processes of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import leaks, world
from tests.vm.conftest import UID_BASE

COMMAND = (sys.executable, "-P", "-m", "sandmartin")
_READY_S = 60.0
_END_S = 60.0


@dataclass(frozen=True)
class Place:
    """Directories of our own, shared by the agents of a test."""

    path: Path

    @property
    def run_dir(self) -> Path:
        return self.path / "run"

    def data_dir(self, name: str = "data") -> Path:
        return self.path / name

    @property
    def environment(self) -> dict[str, str]:
        """Settings that keep an agent apart from any other on the machine."""
        return os.environ | {
            "SANDMARTIN_RUN_DIR": str(self.run_dir),
            "SANDMARTIN_DATA_DIR": str(self.data_dir()),
            "SANDMARTIN_UID_BASE": str(UID_BASE),
            "SANDMARTIN_RESOLV_CONF": str(self.path / "resolv.conf"),
        }

    def run(
        self, *words: str, stdin: bytes | None = None, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[bytes]:
        """The command with these words, to its end."""
        return subprocess.run(
            [*COMMAND, *words],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            env=self.environment,
            timeout=timeout_s,
            check=False,
        )

    def start(self, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        """The command with these words, in a session of its own."""
        return subprocess.Popen(
            [*COMMAND, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment,
            start_new_session=True,
            **options,
        )

    def left(self) -> list[str]:
        """What any agent of this place has left on the machine."""
        found: set[str] = set()
        below = ("*/instance.json", "*/agent/instance.json")
        for instance in (file for each in below for file in self.path.glob(each)):
            identity = json.loads(instance.read_bytes())["id"]
            found |= leaks.find_all(identity, instance.parent, self.run_dir)
        return sorted(found)


@dataclass
class Agent:
    """An agent process that serves."""

    process: subprocess.Popen[bytes]
    data_dir: Path

    @property
    def socket(self) -> Path:
        return self.data_dir / "agent.sock"

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(_END_S)


@pytest.fixture
def place(private_host: None) -> Iterator[Place]:
    """A place of its own for each test; nothing may be left at its end."""
    with new_place() as place:
        yield place


@contextmanager
def new_place() -> Iterator[Place]:
    """A place of its own; nothing may be left at its end."""
    path = Path(tempfile.mkdtemp(prefix="sme2e-", dir="/var/tmp"))
    path.chmod(0o711)
    (path / "resolv.conf").write_text(f"nameserver {world.ROUTER}\n")
    place = Place(path)
    yield place
    left = place.left()
    shutil.rmtree(path)
    assert not left, f"left behind: {left}"


@contextmanager
def agent(place: Place, name: str = "data", *words: str) -> Iterator[Agent]:
    """An agent on a data directory of `place`; SIGTERM ends it, and its VMs run on."""
    data_dir = place.data_dir(name)
    log = (place.path / f"{name}.log").open("ab")
    process = subprocess.Popen(
        [*COMMAND, "agent", "--data-dir", str(data_dir), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        env=place.environment,
        start_new_session=True,
    )
    log.close()
    assert process.stdout is not None
    try:
        announced = process.stdout.readline()
        assert announced, Path(place.path, f"{name}.log").read_text()
        assert json.loads(announced)["socket"] == str(data_dir / "agent.sock")
        yield Agent(process, data_dir)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(_END_S)
        process.stdout.close()
