"""Membership: the agent as a host of a platform on other machines.

A token that works once makes this machine a host. The private key is made here and never leaves;
it stands with the certificates and the host's own token in one file of the data directory, which
root alone reads. From then on the agent is heard of by heartbeats, renews its certificate at half
of its life, and needs no token at a restart. It takes orders from whoever has a certificate of the
platform's control issuer. A control plane that is away changes nothing: the agent goes on, and
stops nothing by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sandmartin.agent.journal import write_whole
from sandmartin.errors import (
    Invalid,
    NotFound,
    SandmartinError,
    Unauthenticated,
    Unavailable,
    from_code,
)
from sandmartin.tls import Identity, agents_context, show

_log = logging.getLogger(__name__)

_FILE = "membership.json"
_FORMAT = 1
HEARTBEAT_S = 30.0
_CALL_S = 20.0
_MAX_ANSWER = 1 << 20

Facts = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the command line says of membership; None or empty is as it was before."""

    #: Address of the control plane.
    control: str = ""
    #: Works once, to register.
    token: str = field(default="", repr=False)
    #: Where to listen, as `HOST:PORT`; port 0 takes a free one.
    listen: str = ""
    #: Name or address at which the control plane reaches us; empty for the one listened on.
    advertise: str = ""
    #: Send tokens over plain HTTP to other machines.
    insecure: bool = False


NO_WISH = Wish()


@dataclass(frozen=True, kw_only=True)
class Membership:
    """What is kept of a membership."""

    control: str
    listen: str
    advertise: str
    #: Of the token with which it registered: the same again means nothing.
    token_digest: str
    host_id: str = ""
    token: str = field(default="", repr=False)
    certificate: str = ""
    key: str = field(default="", repr=False)
    #: Of those that may connect.
    issuer: str = ""
    issued_at: float = 0.0
    expires_at: float = 0.0

    @property
    def identity(self) -> Identity:
        return Identity(certificate=self.certificate, key=self.key)

    def save(self, data_dir: Path) -> None:
        content = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1).encode()
        write_whole(data_dir / _FILE, content, mode=0o600, sync=True)

    @classmethod
    def find(cls, data_dir: Path) -> Membership | None:
        """What was kept in a data directory. Raises Invalid when it is damaged."""
        try:
            kept = json.loads((data_dir / _FILE).read_bytes())
            if kept.pop("format") != _FORMAT:
                raise ValueError("another release wrote it")
            return cls(**{each.name: kept[each.name] for each in fields(cls)})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Invalid(
                f"{data_dir / _FILE} cannot be used: {type(error).__name__}",
                hint="remove it and register again with a new token",
            ) from error


def forget(data_dir: Path) -> None:
    """This machine is no host of a platform any more."""
    (data_dir / _FILE).unlink(missing_ok=True)


def plan(data_dir: Path, wish: Wish) -> Membership | None:
    """The membership that is wished for, perhaps still to be registered; None for none.

    Raises Invalid.
    """
    kept = Membership.find(data_dir)
    digest = hashlib.sha256(wish.token.encode()).hexdigest() if wish.token else ""
    if wish.token and (kept is None or kept.token_digest != digest):
        if not wish.control or not wish.listen:
            raise Invalid(
                "a token alone is not enough to register",
                hint="also give --control URL and --listen HOST:PORT",
            )
        kept = Membership(
            control=_check_control(wish.control, insecure=wish.insecure),
            listen=wish.listen,
            advertise=wish.advertise,
            token_digest=digest,
        )
    elif kept is None:
        if wish.control or wish.listen:
            raise Invalid(
                "this machine is no host of a platform yet",
                hint="get a token with `sandmartin host add NAME`, and give it as --token or "
                "SANDMARTIN_HOST_TOKEN",
            )
        return None
    control = _check_control(wish.control, insecure=wish.insecure) if wish.control else kept.control
    return replace(
        kept,
        control=control,
        listen=wish.listen or kept.listen,
        advertise=wish.advertise or kept.advertise,
    )


def _check_control(url: str, *, insecure: bool) -> str:
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise Invalid(
            f"--control is {url[:80]!r}", hint="use https://NAME or http://127.0.0.1:PORT"
        )
    if parts.scheme == "http" and not insecure and not _is_loopback(parts.hostname):
        raise Invalid(
            "the control plane would be sent our token over plain HTTP",
            hint="use https://, or --insecure-control on a network that nobody listens to",
        )
    return url.rstrip("/")


def _is_loopback(name: str) -> bool:
    with contextlib.suppress(ValueError):
        return ip_address(name).is_loopback
    return name == "localhost"


def split_listen(listen: str) -> tuple[str, int]:
    """The address and the port in `HOST:PORT`. Raises Invalid."""
    host, colon, port = listen.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise Invalid(f"--listen is {listen[:80]!r}", hint="use HOST:PORT; IPv6 as [ADDRESS]:PORT")
    return host.strip("[]"), int(port)


class Member:
    """A membership in use. To be closed."""

    def __init__(
        self, data_dir: Path, membership: Membership, facts: Facts, heartbeat_s: float
    ) -> None:
        self._data_dir = data_dir
        self._membership = membership
        self._facts = facts
        self._heartbeat_s = heartbeat_s
        self._context: ssl.SSLContext | None = None
        self._address = ""
        #: What went wrong last, so that the same is said once.
        self._trouble = ""
        # Certificates of the system's, and of SSL_CERT_FILE; nothing else of the environment.
        self._http = httpx.AsyncClient(
            base_url=membership.control,
            verify=ssl.create_default_context(),
            trust_env=False,
            timeout=_CALL_S,
        )

    async def close(self) -> None:
        await self._http.aclose()

    @property
    def address(self) -> str:
        """Where the control plane reaches us."""
        return self._address

    @property
    def context(self) -> ssl.SSLContext:
        """How we serve; it shows the newest certificate."""
        assert self._context is not None
        return self._context

    @property
    def listen(self) -> tuple[str, int]:
        """The address and the port to listen on. Raises Invalid."""
        return split_listen(self._membership.listen)

    async def join(self, port: int, token: str) -> None:
        """Be reachable at the port that we listen on, and register if that was not done.

        Raises Unauthenticated, Invalid, Unavailable.
        """
        name = self._membership.advertise or self.listen[0]
        if name in {"0.0.0.0", "::"}:  # noqa: S104
            raise Invalid(
                f"nobody reaches us at {name}", hint="say with --advertise where we are reached"
            )
        self._address = f"https://[{name}]:{port}" if ":" in name else f"https://{name}:{port}"
        if not self._membership.host_id:
            await self._register(token)
        self._membership.save(self._data_dir)
        member = self._membership
        self._context = agents_context(member.identity, member.issuer)

    async def _register(self, token: str) -> None:
        key, request = await asyncio.to_thread(new_key)
        answer = await self._post(
            "/v1/hosts/register",
            {"token": token, "request": request, **self._about()},
        )
        issuer = str(answer["issuer"])
        fingerprint = hashlib.sha256(issuer.encode()).hexdigest()
        if not fingerprint.startswith(token.partition(".")[2] or "-"):
            raise Unauthenticated(
                "what answered is not the control plane that our token was made by",
                hint="is the URL right, and is nobody between?",
            )
        self._membership = replace(
            self._with(answer, key), host_id=answer["host_id"], token=answer["token"]
        )
        _log.info("this machine is host %s of %s", answer["host_id"], self._membership.control)

    def _with(self, answer: Mapping[str, Any], key: str) -> Membership:
        return replace(
            self._membership,
            certificate=answer["certificate"],
            key=key,
            issuer=answer["issuer"],
            issued_at=time.time(),
            expires_at=float(answer["expires_at"]),
        )

    def _about(self) -> dict[str, Any]:
        return {"address": self._address, "facts": dict(self._facts())}

    async def run(self) -> None:
        """Be heard of, and renew what runs out, for ever."""
        while True:
            try:
                await self._post(f"{self._path}/heartbeat", self._about())
                await self._renew_in_time()
                self._note_trouble("")
            except NotFound:
                self._note_trouble("the platform has deleted this host; its sandboxes run on")
            except SandmartinError as error:
                self._note_trouble(error.message)
            await asyncio.sleep(self._heartbeat_s)

    @property
    def _path(self) -> str:
        return f"/v1/hosts/{self._membership.host_id}"

    def _note_trouble(self, trouble: str) -> None:
        if trouble and trouble != self._trouble:
            _log.warning("the control plane does not hear of us: %s", trouble)
        elif self._trouble and not trouble:
            _log.info("the control plane hears of us again")
        self._trouble = trouble

    async def _renew_in_time(self) -> None:
        member = self._membership
        if time.time() < (member.issued_at + member.expires_at) / 2:
            return
        key, request = await asyncio.to_thread(new_key)
        answer = await self._post(f"{self._path}/renew", {"request": request})
        if answer["issuer"] != member.issuer:
            raise Unauthenticated("the control plane has another issuer than it had")
        self._membership = self._with(answer, key)
        self._membership.save(self._data_dir)
        show(self.context, self._membership.identity)
        _log.info("the certificate is renewed until %s", time.ctime(self._membership.expires_at))

    async def _post(self, path: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """What the control plane answers. Raises what it says, or Unavailable."""
        token = self._membership.token
        headers = {"x-host-token": token} if token else {}
        try:
            async with asyncio.timeout(_CALL_S):
                response = await self._http.post(path, json=content, headers=headers)
        except (httpx.HTTPError, TimeoutError) as error:
            raise Unavailable(
                f"the control plane at {self._membership.control} cannot be reached"
                f" ({type(error).__name__})",
                hint="is the URL right, and does it run?",
            ) from error
        if response.status_code == 204:
            return {}
        answer = _parse(response.content)
        if not response.is_success:
            raise _error_of(answer, response.status_code)
        return answer


def _parse(content: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(content) if len(content) <= _MAX_ANSWER else None
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise Unavailable("what answers is no control plane", hint="is the URL right?")
    return answer


def _error_of(answer: Mapping[str, Any], status: int) -> SandmartinError:
    told = answer.get("error")
    if not isinstance(told, dict):
        return Unavailable(f"the control plane answered HTTP {status} without saying why")
    words = [str(told.get(name) or "") for name in ("code", "message", "hint")]
    return from_code(*words)


def new_key() -> tuple[str, str]:
    """A new private key, and the request for its certificate, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    # Who we are is not ours to say: the platform takes the key alone.
    request = x509.CertificateSigningRequestBuilder(x509.Name([])).sign(key, hashes.SHA256())
    kept = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return kept.decode(), request.public_bytes(serialization.Encoding.PEM).decode()
