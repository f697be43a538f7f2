"""Which sandbox and port a request is for, as its Host or its headers say.

`{port}-{sandbox id}` as the left-most label of a host name is a sandbox's port, whatever the rest.
Clients that cannot have such a name send `E2b-Sandbox-Id` and `E2b-Sandbox-Port` to the API's own
address. Everything else is the API.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import ip_address

from sandmartin.errors import Invalid
from sandmartin.relay.headers import Headers, values_of
from sandmartin.relay.target import GUEST_PORT, MAX_PORT

ID_HEADER = b"e2b-sandbox-id"
PORT_HEADER = b"e2b-sandbox-port"
_LIKE_A_PORT = re.compile(r"\d*-")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_ID = re.compile(r"[a-z0-9]{1,63}")
_HOST = re.compile(rb"(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
_HINT = "a sandbox's port is at PORT-ID.DOMAIN, as in 8000-sbx1y2z3.example.com"


@dataclass(frozen=True)
class Address:
    """A port of a sandbox."""

    sandbox_id: str
    port: int


def address_of(headers: Headers, api_hosts: Collection[str]) -> Address | None:
    """The sandbox's port that a request is for; None for the API. Raises Invalid."""
    written = next(iter(values_of(headers, b"host")), b"")
    if written and not _HOST.fullmatch(written):
        raise Invalid("the Host header is no host name", hint=_HINT)
    host = host_name(written.decode())
    if host.lower() in api_hosts:
        return _named(headers)
    label, _, rest = host.partition(".")
    if _LIKE_A_PORT.match(label):
        if host.endswith("."):
            raise Invalid("the host name ends with a dot", hint=_HINT)
        return _labelled(label)
    shared = host.lower() == "localhost" or (label.lower() == "sandbox" and rest)
    if shared or _is_ip(host):
        return _named(headers)
    return None


def host_name(written: str) -> str:
    """The name in a Host header, without the port."""
    if written.startswith("["):
        return written[1:].partition("]")[0]
    return written.partition(":")[0]


def _labelled(label: str) -> Address:
    port, _, sandbox_id = label.partition("-")
    return Address(_sandbox_id(sandbox_id), _port(port))


def _named(headers: Headers) -> Address | None:
    ids, ports = values_of(headers, ID_HEADER), values_of(headers, PORT_HEADER)
    if not ids:
        return None
    if len(ids) > 1 or len(ports) > 1:
        raise Invalid("the request names more than one sandbox or port")
    port = _port(ports[0].decode("latin-1")) if ports else GUEST_PORT
    return Address(_sandbox_id(ids[0].decode("latin-1")), port)


def _sandbox_id(text: str) -> str:
    if not text:
        raise Invalid("the sandbox id is empty", hint=_HINT)
    if not _ID.fullmatch(text):
        raise Invalid(
            "the sandbox id is not valid", hint="it has lower-case letters and digits, no dash"
        )
    return text


def _port(text: str) -> int:
    if not text:
        raise Invalid("the port is empty", hint=_HINT)
    if not _PORT.fullmatch(text) or int(text) > MAX_PORT:
        raise Invalid("the port is not valid", hint=f"use 1 to {MAX_PORT}, without zeros in front")
    return int(text)


def _is_ip(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
