"""References: how people name images of registries, as Docker has it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sandmartin.agent.blobs import hex_of
from sandmartin.errors import Invalid

_HUB, _HUB_HOST = "docker.io", "registry-1.docker.io"
_MAX_LENGTH = 1000
_HOST = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?)(?::([0-9]{1,5}))?")
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_MAX_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An image in a registry."""

    #: As its user calls it, with the port if one is given.
    registry: str
    #: Where it is asked.
    host: str
    port: int
    repository: str
    tag: str
    #: Empty where the tag says which it is.
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Of `[HOST[:PORT]/]NAME[:TAG][@sha256:...]`. Raises Invalid."""
        hint = "use registry.example/team/image:tag, or image:tag of Docker Hub"
        rest, at, digest = text.partition("@")
        registry, path = _split_registry(rest)
        name, colon, tag = path.partition(":")
        if registry == _HUB and "/" not in name:
            name = f"library/{name}"
        host = _HOST.fullmatch(registry)
        port = int(host[2] or 443) if host else 0
        if (
            host is None
            or len(text) > _MAX_LENGTH
            or not 0 < port <= _MAX_PORT
            or not _REPOSITORY.fullmatch(name)
            or (colon and not _TAG.fullmatch(tag))
            or (at and hex_of(digest) is None)
        ):
            raise Invalid(f"{text[:200]!r} is no image of a registry", hint=hint)
        return cls(
            registry=registry,
            host=_HUB_HOST if registry == _HUB else host[1],
            port=port,
            repository=name,
            tag=tag or "latest",
            digest=digest,
        )

    def at(self, digest: str) -> str:
        """The same image by a digest; by its tag when that is empty."""
        return f"{self.registry}/{self.repository}" + (f"@{digest}" if digest else f":{self.tag}")

    def __str__(self) -> str:
        return self.at(self.digest)


def _split_registry(text: str) -> tuple[str, str]:
    first, slash, rest = text.partition("/")
    if slash and (first == "localhost" or "." in first or ":" in first):
        return _HUB if first == f"index.{_HUB}" else first, rest
    return _HUB, text
