"""Requests that go out on a user's word: to webhooks, chat services, identity providers.

They go only where `relay.guard` lets them. Redirects are not followed, answers are read up to a
limit, and all of it ends at a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx

from sandmartin.errors import Invalid, Unavailable
from sandmartin.relay.guard import Guard, Network, Resolve, parse_networks, resolve_name

DEADLINE_S = 10.0
_MAX_ANSWER_BYTES = 64 * 1024
_PORTS = {"http": 80, "https": 443}
_ALLOW = "outgoing_allow"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back: the status, and the beginning of the body."""

    status: int
    content: bytes


def allowed_networks(setting: str) -> Sequence[Network]:
    """What the setting `outgoing_allow` says. Raises Invalid."""
    return parse_networks(setting, _ALLOW)


class Outgoing(Guard):
    """The way out, for whatever goes where a user says."""

    def __init__(
        self,
        allow: Sequence[Network] = (),
        resolve: Resolve = resolve_name,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(allow, _ALLOW, resolve)
        self._tls = tls or httpx.create_ssl_context()

    def check_url(self, url: str) -> httpx.URL:
        """The address, if it is one that can be asked. Raises Invalid."""
        hint = "use https://HOST/PATH, without a user name"
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise Invalid("the address cannot be read", hint=hint) from error
        if parsed.scheme not in _PORTS or not parsed.host or parsed.userinfo:
            raise Invalid("the address is none that can be used", hint=hint)
        return parsed.copy_with(fragment=None)

    async def request(
        self,
        method: str,
        url: str,
        *,
        content: bytes = b"",
        headers: Mapping[str, str] | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> Answer:
        """Ask, and give what was answered, whatever it is.

        Raises Invalid, Denied, Unavailable; none of them tells the address.
        """
        parsed = self.check_url(url)
        try:
            async with asyncio.timeout(deadline_s):
                found = await self.addresses(parsed.host, parsed.port or _PORTS[parsed.scheme])
                return await self._ask(method, parsed, found, content, headers or {})
        except TimeoutError as error:
            raise Unavailable(f"no answer within {deadline_s:g} s") from error
        except httpx.HTTPError as error:
            raise Unavailable(f"the request failed ({type(error).__name__})") from error

    async def _ask(
        self,
        method: str,
        url: httpx.URL,
        addresses: Sequence[str],
        content: bytes,
        headers: Mapping[str, str],
    ) -> Answer:
        sent = {**headers, "Host": url.netloc.decode("ascii")}
        # The certificate must be that of the name, though the connection goes to the address.
        named = {"sni_hostname": url.raw_host.decode("ascii")} if url.scheme == "https" else {}
        async with httpx.AsyncClient(
            verify=self._tls, trust_env=False, follow_redirects=False, timeout=DEADLINE_S
        ) as client:
            for last, address in enumerate(addresses, 1 - len(addresses)):
                request = client.build_request(
                    method,
                    url.copy_with(host=address),
                    content=content,
                    headers=sent,
                    extensions=named,
                )
                try:
                    answer = await client.send(request, stream=True)
                except httpx.ConnectError:
                    if not last:
                        raise
                    continue
                async with contextlib.aclosing(answer):
                    return Answer(status=answer.status_code, content=await _beginning(answer))
        raise AssertionError("there is at least one address")


async def _beginning(answer: httpx.Response) -> bytes:
    content = b""
    async for chunk in answer.aiter_raw():
        content += chunk[: _MAX_ANSWER_BYTES - len(content)]
        if len(content) >= _MAX_ANSWER_BYTES:
            break
    return content
