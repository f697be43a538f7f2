"""Manifests: what an artefact is made of. Written last, read first, named by their content.

An artefact has parts, each a sparse file: its size, and its chunks where it is not all zero. The
signature is over the digests of the parts, by the key of the platform whose host made it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sandmartin.artefacts import chunks
from sandmartin.artefacts.chunks import CHUNK_BYTES, is_digest
from sandmartin.artefacts.store import Store
from sandmartin.errors import Invalid, NotFound

PREFIX = "artefacts/"
_FORMAT = 1
_SIGNED = b"sandmartin artefact 1\n"
_MAX_BYTES = 256 << 20
_MAX_PARTS = 200
_MAX_NAME = 100
#: More than any disk or memory of a sandbox.
_MAX_PART_BYTES = 1 << 42


@dataclass(frozen=True)
class Part:
    """A file, and its chunks by their number: chunk 1 begins at 1 MiB. What is left out is zero."""

    size_bytes: int
    chunks: Mapping[int, str]

    def length(self, number: int) -> int:
        """Of a chunk, in bytes: of the last one what is left."""
        return min(CHUNK_BYTES, self.size_bytes - number * CHUNK_BYTES)

    def to_json(self) -> dict[str, Any]:
        return {"size_bytes": self.size_bytes, "chunks": sorted(self.chunks.items())}

    @classmethod
    def from_json(cls, raw: Any) -> Part:
        """Raises Invalid, and what a wrong form raises."""
        size_bytes, found = raw["size_bytes"], raw["chunks"]
        if type(size_bytes) is not int or not 0 <= size_bytes <= _MAX_PART_BYTES:
            raise Invalid("the manifest has a part of a size that cannot be")
        by_number = {number: digest for number, digest in found}
        last = -(-size_bytes // CHUNK_BYTES)
        right = (
            type(number) is int and 0 <= number < last and is_digest(digest)
            for number, digest in by_number.items()
        )
        if len(by_number) != len(found) or not all(right):
            raise Invalid("the manifest has a chunk that cannot be")
        return cls(size_bytes, by_number)

    @property
    def digest(self) -> str:
        return hashlib.sha256(_text(self.to_json())).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """What an artefact is made of."""

    parts: Mapping[str, Part]
    signature: str = ""

    @property
    def signed(self) -> bytes:
        """What the signature is of."""
        return _SIGNED + _text({name: part.digest for name, part in self.parts.items()})

    @property
    def size_bytes(self) -> int:
        """Of all chunks, before compression."""
        return sum(part.length(number) for part in self.parts.values() for number in part.chunks)

    def digests(self) -> Iterator[str]:
        """Of all its chunks."""
        for part in self.parts.values():
            yield from part.chunks.values()

    def to_json(self) -> bytes:
        parts = {name: part.to_json() for name, part in self.parts.items()}
        return _text({"format": _FORMAT, "parts": parts, "signature": self.signature})

    @classmethod
    def from_json(cls, content: bytes) -> Manifest:
        """Raises Invalid."""
        try:
            raw = json.loads(content)
            if raw["format"] != _FORMAT:
                raise Invalid(f"an artefact of format {raw['format']!r:.20} is not {_FORMAT}")
            if len(raw["parts"]) > _MAX_PARTS or any(
                len(name) > _MAX_NAME for name in raw["parts"]
            ):
                raise Invalid(f"the manifest has more than {_MAX_PARTS} parts, or odd names")
            parts = {name: Part.from_json(part) for name, part in raw["parts"].items()}
            return cls(parts, str(raw["signature"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Invalid("the manifest of the artefact cannot be read") from error


def _text(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def name_of(artefact_id: str) -> str:
    """The object of a manifest."""
    return f"{PREFIX}{artefact_id}"


async def write(store: Store, manifest: Manifest) -> str:
    """Make an artefact of chunks that are there; its id. Raises DiskFull, Unavailable, Denied."""
    content = manifest.to_json()
    artefact_id = chunks.digest_of(content)
    await store.put(name_of(artefact_id), chunks.pack(content))
    return artefact_id


async def read(store: Store, artefact_id: str) -> Manifest:
    """An artefact's manifest, verified. Raises Invalid when damaged or gone, Unavailable."""
    if not is_digest(artefact_id):
        raise Invalid(f"{artefact_id[:80]!r} is no id of an artefact")
    try:
        packed = await store.get(name_of(artefact_id), _MAX_BYTES)
    except NotFound as error:
        raise Invalid(f"artefact {artefact_id[:12]} is not in the artefact store") from error
    content = chunks.unpack(packed, _MAX_BYTES)
    if chunks.digest_of(content) != artefact_id:
        raise Invalid(f"the manifest of artefact {artefact_id[:12]} is damaged")
    return Manifest.from_json(content)
