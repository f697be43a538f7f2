"""Where sandboxes are served: a control plane, or the host agent of this machine.

It is found from what is given, SANDMARTIN_URL and SANDMARTIN_API_KEY, the stored login, and then
the agent's socket, in this order. A stored key is sent nowhere but to where it was stored for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sandmartin.errors import Invalid
from sandmartin.model import Settings
from sandmartin.transport.agent import AgentSocket
from sandmartin.transport.login import login_file, stored_login
from sandmartin.transport.rest import Rest

_UNIX = "unix:"


@dataclass(frozen=True)
class Place:
    """A control plane by URL and key, or a host agent by its socket."""

    url: str = ""
    api_key: str = field(default="", repr=False)
    socket: Path | None = None

    def __str__(self) -> str:
        return self.url or f"the agent on {self.socket}"

    def transport(self) -> Rest | AgentSocket:
        """A new transport to it. Raises Invalid."""
        return Rest(self.url, self.api_key) if self.socket is None else AgentSocket(self.socket)


def find_place(
    url: str | None = None, api_key: str | None = None, environ: Mapping[str, str] | None = None
) -> Place:
    """Where sandboxes are served. A URL `unix:/path` is an agent's socket. Raises Invalid."""
    environ = os.environ if environ is None else environ
    url = url or environ.get("SANDMARTIN_URL", "")
    if url.startswith(_UNIX):
        return Place(socket=Path(url.removeprefix(_UNIX)))
    api_key = api_key or environ.get("SANDMARTIN_API_KEY", "")
    if not (url and api_key) and (stored := stored_login(login_file(environ))) is not None:
        url = url or stored.url
        if url.rstrip("/") == stored.url:
            api_key = api_key or stored.api_key
    if url and api_key:
        return Place(url=url, api_key=api_key)
    if url:
        raise Invalid(
            f"there is no API key for {url}",
            hint=f"set SANDMARTIN_API_KEY, or log in: sandmartin login {url}",
        )
    if api_key:
        raise Invalid(
            "SANDMARTIN_URL does not say for which control plane SANDMARTIN_API_KEY is",
            hint="set both, as `sandmartin up` prints them",
        )
    return Place(socket=Settings.load(environ=environ).socket)
