"""What agents of one machine share: slot numbers, and what was switched on for all of them.

A slot's number fixes its addresses and its user id, so no two agents may hold the same one. Each
claim is a file in the run directory that names its owner, made and removed under one lock. The
directory does not survive a reboot, and neither does anything that a claim stands for.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sandmartin.agent import namespace
from sandmartin.agent.journal import INSTANCE, write_whole
from sandmartin.errors import Exhausted, ToolFailed


class Claims:
    """The claims of one agent, among those of the others."""

    def __init__(self, run_dir: Path, instance_id: str, data_dir: Path) -> None:
        self._run_dir = run_dir
        self._slots = run_dir / "slots"
        self._shared = run_dir / "shared.json"
        self._owner = {"instance": instance_id, "data_dir": os.fspath(data_dir.resolve())}
        self.instance_id = instance_id

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._slots.mkdir(parents=True, exist_ok=True)
            with (self._run_dir / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except PermissionError as error:
            raise ToolFailed(
                f"{self._run_dir} cannot be written", hint="run the agent as root"
            ) from error

    def take_slot(self, limit: int) -> int:
        """Claim the lowest free number from 1 to `limit`. Raises Exhausted."""
        with self._locked():
            taken = {int(path.name) for path in self._slots.iterdir() if path.name.isdigit()}
            for number in range(1, limit + 1):
                if number not in taken or self._abandoned(number):
                    self._claim(number)
                    return number
        raise Exhausted(
            f"all {limit} network slots of this machine are taken",
            hint="destroy sandboxes, or choose a larger SANDMARTIN_ADDRESS_RANGE",
        )

    def keep_slot(self, number: int) -> bool:
        """Claim a number that the journal knows; False when it is another agent's by now."""
        with self._locked():
            owner = self._owner_of(number)
            if owner is None:
                self._claim(number)
            return owner is None or owner["instance"] == self.instance_id

    def give_back_slot(self, number: int) -> None:
        """End a claim of ours. Idempotent."""
        with self._locked():
            if self._is_ours(number):
                (self._slots / str(number)).unlink(missing_ok=True)

    def list_slots(self) -> list[int]:
        """Our numbers."""
        with self._locked():
            found = [int(path.name) for path in self._slots.iterdir() if path.name.isdigit()]
            return sorted(number for number in found if self._is_ours(number))

    def _claim(self, number: int) -> None:
        write_whole(self._slots / str(number), json.dumps(self._owner).encode(), mode=0o644)

    def _owner_of(self, number: int) -> dict[str, Any] | None:
        try:
            owner = json.loads((self._slots / str(number)).read_bytes())
        except FileNotFoundError:
            return None
        return owner if isinstance(owner, dict) else {"instance": "", "data_dir": ""}

    def _is_ours(self, number: int) -> bool:
        owner = self._owner_of(number)
        return owner is not None and owner["instance"] == self.instance_id

    def _abandoned(self, number: int) -> bool:
        """Whether a claim's agent is gone for good: its data directory was removed."""
        owner = self._owner_of(number)
        if owner is None:
            return True
        try:
            instance = json.loads((Path(owner["data_dir"]) / INSTANCE).read_bytes())["id"]
        except (OSError, ValueError, KeyError, TypeError):
            instance = None
        if owner["instance"] in {instance, self.instance_id}:
            return False
        # A VM that still runs keeps its place even then.
        return not namespace.path_of_slot(str(owner["instance"]), number).exists()

    @contextlib.contextmanager
    def shared(self) -> Iterator[dict[str, set[str]]]:
        """What agents need together: by its name, the instances that need it.

        Nobody else sees or changes it meanwhile; what the caller changed is kept.
        """
        with self._locked():
            try:
                kept: dict[str, list[str]] = json.loads(self._shared.read_bytes())
            except FileNotFoundError:
                kept = {}
            users = {name: set(instances) for name, instances in kept.items()}
            yield users
            content = {name: sorted(instances) for name, instances in users.items()}
            if content != kept:
                write_whole(self._shared, json.dumps(content).encode(), mode=0o644)
