"""Registries: how an image is fetched from one.

`skopeo` speaks with the registry, in a cell whose only way out is a guarded proxy; the password is
in a file of the cell's own memory. An image is resolved to a digest once and everything is
fetched by digests. Layers that were fetched before are lent from the cache.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import re
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from sandmartin.agent.blobs import Blobs, hex_of
from sandmartin.agent.cell import Cell, Way, guarded_way
from sandmartin.agent.reference import Reference
from sandmartin.agent.snapshots import Signer
from sandmartin.errors import (
    Denied,
    DiskFull,
    Exhausted,
    Invalid,
    NotFound,
    SandmartinError,
    Unavailable,
)
from sandmartin.model import Settings
from sandmartin.relay.guard import Guard, parse_networks

_PLATFORM = ("linux", "amd64")
#: Whom to trust is the business of whoever names an image.
SKOPEO = ("skopeo", "--insecure-policy", "--override-os=linux", "--override-arch=amd64")
#: Name of an image in its layout.
IMAGE = "image"
_MAX_LAYERS = 500
_RESOLVE_S = 10.0
_ASK_S = 60.0
_FETCH_S = 3600.0
_AUTH_FILE = "auth.json"
#: Before what is signed, so that no other signature is a scope.
_SCOPE = b"sandmartin layers 1\n"
_PUBLIC = "public"
#: What may have a signature in it, in what skopeo says.
_QUERY = re.compile(r"\?[^\s\"']+")
_SAID = 400
_WRONG = "the registry's answer is no manifest of an image"


@dataclass(frozen=True)
class RegistryAuth:
    """Whom to be for a registry."""

    username: str = field(repr=False)
    password: str = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an image consists of."""

    digest: str
    #: Digests of its layers, the lowest first.
    layers: Sequence[str]
    #: Of the layers as they are fetched.
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Visit:
    """One image of a registry, and the way there."""

    reference: Reference
    auth: RegistryAuth | None
    cell: Cell
    way: Way
    #: Without TLS.
    plain: bool

    async def skopeo(
        self, words: Sequence[str], *more: str, digest: str, deadline_s: float
    ) -> bytes:
        """What skopeo says of the image. Raises Denied, NotFound, Unavailable, Invalid."""
        prefix = "src-" if words[0] == "copy" else ""
        options = [f"--{prefix}tls-verify={'false' if self.plain else 'true'}"]
        options.append(f"--authfile=/run/{_AUTH_FILE}")
        source = f"docker://{self.reference.at(digest)}"
        done = await self.cell.run(
            [*SKOPEO, *words, *options, source, *more],
            deadline_s=deadline_s,
            way=self.way,
            files={_AUTH_FILE: self._auth_file()},
        )
        if done.returncode:
            raise explain(self.reference, done.stderr.decode(errors="replace"))
        return done.stdout

    def _auth_file(self) -> str:
        auths = {}
        if self.auth is not None:
            both = f"{self.auth.username}:{self.auth.password}".encode()
            auths[self.reference.registry] = {"auth": base64.b64encode(both).decode()}
        return json.dumps({"auths": auths})

    async def copy(self, manifest: Manifest, layout: Path) -> None:
        """Complete a layout, in which the image is named `image`. Raises what `skopeo` does."""
        target = f"oci:{layout}:{IMAGE}"
        await self.skopeo(("copy",), target, digest=manifest.digest, deadline_s=_FETCH_S)

    async def manifest(self) -> Manifest:
        """Of the image for our platform. Raises what `skopeo` does."""
        words = ("inspect", "--raw")
        digest = self.reference.digest
        content = await self.skopeo(words, digest=digest, deadline_s=_ASK_S)
        if (chosen := _choose(_parse(content))) is not None:
            content = await self.skopeo(words, digest=chosen, deadline_s=_ASK_S)
        return _read(content)


class Registries:
    """The way to registries, as the settings have it."""

    def __init__(self, settings: Settings, blobs: Blobs, signer: Signer) -> None:
        """Raises Invalid."""
        private = parse_networks(settings.registries_private, "registries_private")
        self._guard = Guard(private, "registries_private")
        self._plain = {each.strip() for each in settings.registries_plain.split(",")}
        self._blobs = blobs
        self._signer = signer

    @contextlib.asynccontextmanager
    async def visit(
        self, reference: Reference, auth: RegistryAuth | None, cell: Cell
    ) -> AsyncIterator[Visit]:
        """The way to an image. Raises Denied, Unavailable."""
        host = "127.0.0.1" if reference.host == "localhost" else reference.host
        # Said here, where it can be told from a registry that is down.
        try:
            async with asyncio.timeout(_RESOLVE_S):
                await self._guard.addresses(host, reference.port)
        except TimeoutError as error:
            raise Unavailable(f"the name of registry {host} is not resolved in time") from error
        loopback = (host, reference.port) if _is_loopback(host) else None
        async with guarded_way(self._guard, loopback) as way:
            yield Visit(
                reference=reference,
                auth=auth,
                cell=cell,
                way=way,
                plain=reference.registry in self._plain,
            )

    def lend(self, visit: Visit, manifest: Manifest, layout: Path) -> set[str]:
        """Make a layout that has what is known of an image already; the digests of that.

        Takes as long as reading it does.
        """
        # Root's until all is there: the programs of the cell have no hand in it.
        for directory in (layout, layout / "blobs", layout / "blobs/sha256"):
            directory.mkdir()
        scope = self._scope(visit)
        lent = {
            digest
            for digest in manifest.layers
            if self._blobs.lend(scope, digest, layout.joinpath(*place_of(digest)))
        }
        for directory in (layout / "blobs/sha256", layout / "blobs", layout):
            os.chown(directory, visit.cell.uid, visit.cell.uid)
        return lent

    def keep(self, visit: Visit, digests: Collection[str], layout: str) -> None:
        """Keep layers that were fetched. Takes as long as reading them does."""
        for digest in digests:
            with visit.cell.opened(layout, *place_of(digest)) as handle:
                if handle is not None:
                    self._blobs.keep(self._scope(visit), digest, handle)

    def _scope(self, visit: Visit) -> str:
        """By which layers are kept: those that a password opened are for who has it."""
        if visit.auth is None:
            return _PUBLIC
        where = [visit.reference.registry, visit.reference.repository]
        words = [*where, visit.auth.username, visit.auth.password]
        return self._signer.sign(_SCOPE + json.dumps(words).encode())


def place_of(digest: str) -> tuple[str, ...]:
    """Where a blob is in a layout."""
    return ("blobs", "sha256", digest.removeprefix("sha256:"))


def _is_loopback(host: str) -> bool:
    try:
        return IPv4Address(host).is_loopback
    except ValueError:
        return False


# Manifests, of OCI and of Docker alike.


def _parse(content: bytes) -> Mapping[str, Any]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Invalid(_WRONG) from error
    if not isinstance(parsed, dict):
        raise Invalid(_WRONG)
    return parsed


def _choose(index: Mapping[str, Any]) -> str | None:
    """The digest of the image for our platform in an index; None when this is an image itself."""
    if "manifests" not in index:
        return None
    try:
        for each in index["manifests"]:
            platform = each.get("platform", {})
            if (platform.get("os"), platform.get("architecture")) == _PLATFORM:
                return _checked(each["digest"])
    except (AttributeError, KeyError, TypeError) as error:
        raise Invalid(_WRONG) from error
    raise Invalid(f"the image is not made for {'/'.join(_PLATFORM)}")


def _checked(digest: object) -> str:
    if not isinstance(digest, str) or hex_of(digest) is None:
        raise Invalid(_WRONG, hint="digests must be sha256")
    return digest


def _read(content: bytes) -> Manifest:
    manifest = _parse(content)
    if manifest.get("schemaVersion") != 2:
        raise Invalid("the image is of a form that is no longer used", hint="push it anew")
    try:
        layers = manifest["layers"]
        if len(layers) > _MAX_LAYERS:
            raise Invalid(f"the image has {len(layers)} layers", hint=f"use {_MAX_LAYERS} at most")
        for each in layers:
            _check_layer(each)
        return Manifest(
            digest=f"sha256:{hashlib.sha256(content).hexdigest()}",
            layers=list(dict.fromkeys(_checked(each["digest"]) for each in layers)),
            size_bytes=sum(int(each["size"]) for each in layers),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Invalid(_WRONG) from error


def _check_layer(layer: Mapping[str, Any]) -> None:
    if layer.get("urls"):
        raise Invalid(f"layer {layer['digest']} is elsewhere", hint="push the image with it")
    if layer.get("mediaType", "").endswith("zstd"):
        raise Invalid(f"layer {layer['digest']} is compressed by zstd", hint="push it with gzip")


# What went wrong.

#: Words in what skopeo says, the first that fit, and what they mean.
_MEANINGS: Sequence[tuple[str, type[SandmartinError], str]] = (
    ("no space left on device", DiskFull, "the host's disk is full"),
    ("file too large", Exhausted, "a layer of {} is larger than the disk of a sandbox"),
    ("x509:", Unavailable, "the registry of {} has no certificate that is trusted here"),
    ("digest did not match", Unavailable, "the registry sent something else than it names of {}"),
    ("does not match", Unavailable, "the registry sent something else than it names of {}"),
    ("unexpected eof", Unavailable, "the registry broke off in the middle of {}"),
    ("unauthorized", Denied, "the registry does not let {} be pulled"),
    ("authentication required", Denied, "the registry does not let {} be pulled"),
    ("denied", Denied, "the registry does not let {} be pulled"),
    ("manifest unknown", NotFound, "there is no image {}"),
    ("name unknown", NotFound, "there is no image {}"),
    ("repository name not known", NotFound, "there is no image {}"),
    ("toomanyrequests", Unavailable, "the registry has had too many requests for {}"),
    ("pinging container registry", Unavailable, "the registry of {} does not answer"),
)
_HINTS: Mapping[type[SandmartinError], str] = {
    Denied: "give a user name and a password that may pull it",
    NotFound: "look at its name and tag",
}


def explain(reference: Reference, said: str) -> SandmartinError:
    """What skopeo's last words mean, of an image in a registry."""
    last = _last_words(said)
    for words, kind, message in _MEANINGS:
        if words in last.lower():
            return kind(message.format(reference), hint=_HINTS.get(kind, last))
    return Unavailable(f"image {reference} cannot be fetched: {last}")


def explain_archive(said: str) -> SandmartinError:
    """What skopeo's last words mean, of an archive."""
    last = _last_words(said)
    if "no space left on device" in last:
        return DiskFull("the host's disk is full", hint="free disk space on the host")
    if "file too large" in last:
        return Invalid("a layer of the archive is larger than the disk of a sandbox")
    if "did not match" in last:
        return Invalid(f"the archive is damaged: {last}", hint="send it again")
    return Invalid(
        f"the archive is no image of OCI or Docker: {last}",
        hint="`docker save` makes one, and `skopeo copy` to oci-archive:FILE",
    )


def _last_words(said: str) -> str:
    line = (said.strip().splitlines() or ["without a word"])[-1]
    text = (line.partition("msg=")[2] or line).replace('\\"', '"')
    return _QUERY.sub("", text).strip('" ')[:_SAID]
