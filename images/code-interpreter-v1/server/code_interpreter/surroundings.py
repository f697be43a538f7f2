"""What the sandbox says of itself: which one it is, and its environment.

A sandbox may begin as a copy of one that runs: then all that is here is there too, and only what
is read anew tells the difference.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tornado.httpclient import AsyncHTTPClient, HTTPClientError

_log = logging.getLogger(__name__)

_DEADLINE_S = 5.0


@dataclass(frozen=True)
class Surroundings:
    """A sandbox at one moment."""

    machine_id: str = ""
    envs: Mapping[str, str] = field(default_factory=dict, repr=False)


class Sandbox:
    """The sandbox that this is, asked again when it may have become another."""

    def __init__(self, envs_url: str, machine_id: Path) -> None:
        self._envs_url = envs_url
        self._machine_id = machine_id
        self._known: tuple[str, str] | None = None
        self._surroundings = Surroundings()

    async def look(self, token: str) -> Surroundings:
        """What it is now; `token` is what the guest agent is asked with."""
        machine_id = self._read_machine_id()
        if self._known != (machine_id, token):
            self._surroundings = Surroundings(machine_id, await self._fetch_envs(token))
            self._known = machine_id, token
        return self._surroundings

    def _read_machine_id(self) -> str:
        try:
            return self._machine_id.read_text().strip()
        except OSError:
            return ""

    async def _fetch_envs(self, token: str) -> dict[str, str]:
        """The environment of the sandbox; none where the guest agent tells none."""
        headers = {"X-Access-Token": token} if token else {}
        try:
            response = await AsyncHTTPClient().fetch(
                self._envs_url,
                headers=headers,
                connect_timeout=_DEADLINE_S,
                request_timeout=_DEADLINE_S,
                follow_redirects=False,
            )
            found = json.loads(response.body)
        except (HTTPClientError, OSError, ValueError) as error:
            # The error's own text might have the request in it.
            _log.info("the sandbox's environment is not known: %s", type(error).__name__)
            return {}
        if not isinstance(found, dict):
            return {}
        return {str(name): str(value) for name, value in found.items()}
