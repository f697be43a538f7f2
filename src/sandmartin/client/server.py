"""A control plane, beyond what every transport can: pages, tokens, and ports of sandboxes.

Requests to a port go to the control plane's own address with headers that say which sandbox and
port are meant. They carry tokens of that sandbox alone, never the API key.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import httpx

from sandmartin.client.ports import name_of
from sandmartin.errors import (
    Conflict,
    Denied,
    Exhausted,
    Invalid,
    NotFound,
    SandmartinError,
    TimedOut,
    Unauthenticated,
    Unavailable,
)
from sandmartin.transport import SandboxInfo
from sandmartin.transport.builds import Builds
from sandmartin.transport.connect import FROM_CONNECT
from sandmartin.transport.fields import parts, text
from sandmartin.transport.rest import Rest, sandbox_info

GUEST_PORT = 49983
CODE_PORT = 49999

_CONNECT_S = 10.0
_WRITE_S = 60.0
_MAX_ERROR_BYTES = 1 << 20
_FROM_STATUS: Mapping[int, type[SandmartinError]] = {
    400: Invalid,
    401: Unauthenticated,
    403: Denied,
    404: NotFound,
    409: Conflict,
    429: Exhausted,
    504: TimedOut,
}
#: Of a 502 for a sandbox that is gone or paused; it is part of the protocol.
_NOT_RUNNING = "was not found"


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What opens the ports of one sandbox."""

    access: str = field(repr=False)
    #: Empty when its ports are open to all.
    traffic: str = field(repr=False)
    #: Below which each port has a name; empty for the server's own.
    domain: str


class Server:
    """One control plane."""

    def __init__(self, rest: Rest) -> None:
        self._api = rest.api
        self._url = rest.api.url
        self._ports = httpx.AsyncClient(
            base_url=self._url,
            # Loading certificates takes long: not where there is no TLS.
            verify=self._url.startswith("https:"),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=10),
        )
        self._tokens: dict[str, Tokens] = {}

    @property
    def builds(self) -> Builds:
        """Builds of templates, and their tags."""
        return Builds(self._api)

    async def aclose(self) -> None:
        """Close the connections to the ports of sandboxes."""
        await self._ports.aclose()

    async def page(
        self, states: Sequence[str], metadata: Mapping[str, str], limit: int, cursor: str
    ) -> tuple[tuple[SandboxInfo, ...], str]:
        """Some sandboxes, newest first, and the cursor of the next ones; empty at the end."""
        params = {
            "state": list(states),
            "metadata": [f"{name}={value}" for name, value in metadata.items()],
            "limit": limit,
            "cursor": cursor,
        }
        answer = await self._api.ask("GET", "/v1/sandboxes", params=params)
        found = tuple(sandbox_info(each) for each in parts(answer, "items"))
        return found, text(answer, "next")

    async def tokens(self, sandbox_id: str) -> Tokens:
        """What opens the ports of a sandbox: the same for its whole life. Raises NotFound."""
        if (known := self._tokens.get(sandbox_id)) is not None:
            return known
        answer = await self._api.ask("GET", f"/v1/sandboxes/{sandbox_id}/access")
        found = Tokens(
            access=text(answer, "access_token"),
            traffic=text(answer, "traffic_token"),
            domain=text(answer, "domain"),
        )
        self._tokens[sandbox_id] = found
        return found

    async def url_of(self, sandbox_id: str, port: int) -> str:
        """Where a port of a sandbox is served. Raises NotFound, Invalid."""
        tokens = await self.tokens(sandbox_id)
        return name_of(self._url, tokens.domain, sandbox_id, port)

    @asynccontextmanager
    async def open(
        self,
        sandbox_id: str,
        port: int,
        path: str,
        *,
        method: str = "POST",
        body: object = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        quiet_s: float,
    ) -> AsyncGenerator[httpx.Response, None]:
        """The answer of a port of a sandbox to one request, its body still to come.

        Raises what the answer says when it is an error, TimedOut when nothing comes for `quiet_s`.
        """
        tokens = await self.tokens(sandbox_id)
        own = {
            "E2b-Sandbox-Id": sandbox_id,
            "E2b-Sandbox-Port": str(port),
            "X-Access-Token": tokens.access,
            **({"E2B-Traffic-Access-Token": tokens.traffic} if tokens.traffic else {}),
        }
        with _foreign_errors(self._url):
            request = self._ports.build_request(
                method,
                path,
                json=body,
                content=content,
                headers={**own, **(headers or {})},
                timeout=httpx.Timeout(quiet_s, connect=_CONNECT_S, write=_WRITE_S),
            )
            response = await self._ports.send(request, stream=True)
            try:
                if not response.is_success:
                    raise await _refusal(response)
                yield response
            finally:
                await response.aclose()


@contextmanager
def _foreign_errors(url: str) -> Iterator[None]:
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise Unavailable(f"the control plane at {url} cannot be reached") from error
    except httpx.TimeoutException as error:
        raise TimedOut("the sandbox did not answer in time") from error
    except httpx.TransportError as error:
        raise Unavailable("the connection to the sandbox was lost") from error


async def _refusal(response: httpx.Response) -> SandmartinError:
    """The error that an answer tells: the proxy's, a service's, or the guest agent's."""
    answer = bytearray()
    async for piece in response.aiter_bytes():
        answer += piece
        if len(answer) > _MAX_ERROR_BYTES:
            break
    try:
        told = json.loads(bytes(answer))
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        told = {"message": bytes(answer[:500]).decode(errors="replace").strip()}
    message = str(told.get("message") or told.get("detail") or f"HTTP {response.status_code}")
    by_name = FROM_CONNECT.get(str(told.get("code")))
    if by_name is None and response.status_code == 502 and _NOT_RUNNING in message:
        return NotFound("the sandbox does not run", hint="connect(id) wakes one that is paused")
    return (by_name or _FROM_STATUS.get(response.status_code, Unavailable))(message)
