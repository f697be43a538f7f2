"""Templates on their way into an artefact store and out of one.

What goes in is signed with the key that the platform gives along with its order, which no host
keeps, and what comes out is believed by that signature alone, whichever host made it. Here it is
signed anew by this machine. A fetch is made once for all who ask for the same, and ends when
nobody waits any more; it leaves a whole template or nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sandmartin.agent import disk, files
from sandmartin.agent.content import MANIFEST, Contents, Received, limit_of, new_file
from sandmartin.agent.extents import chunks_with_data, read_chunk, write_chunk
from sandmartin.agent.machine import Machine
from sandmartin.agent.sandbox import Sandbox
from sandmartin.agent.snapshots import Draft, Signer
from sandmartin.agent.tasks import to_its_end
from sandmartin.agent.templates import Templates
from sandmartin.artefacts import chunks, manifest
from sandmartin.artefacts.chunks import CHUNK_BYTES
from sandmartin.artefacts.manifest import Manifest, Part
from sandmartin.artefacts.store import Store
from sandmartin.errors import Conflict, Invalid

#: Opens all parts: small contents, and files.
_Open = Callable[[contextlib.ExitStack], Awaitable[tuple[Mapping[str, bytes], Mapping[str, int]]]]
#: Chunks that are on their way at a time, each with its compressed form in memory.
_AT_ONCE = 8
_TELL_S = 1.0
_MB = 2**20


@dataclass(frozen=True)
class Place:
    """An artefact store, and who signs what is in it."""

    store: Store
    signer: Signer


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a push is, in chunks."""

    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What a push came to."""

    artefact_id: str
    #: Of its chunks, before compression.
    size_bytes: int
    #: What was not there before, compressed.
    added_bytes: int


@dataclass
class _Push:
    """One push: what is sent, and how far it is."""

    store: Store
    sizes: Mapping[str, int]
    total: int
    done: int = 0
    added_bytes: int = 0
    found: dict[str, dict[int, str]] = field(default_factory=dict)

    @property
    def progress(self) -> Progress:
        return Progress(done=self.done, total=self.total)

    async def add(self, part: str, number: int, content: bytes | bytearray | None) -> None:
        if content is not None:
            digest, added = await chunks.add(self.store, bytes(content))
            self.found.setdefault(part, {})[number] = digest
            self.added_bytes += added
        self.done += 1

    def parts(self) -> dict[str, Part]:
        return {name: Part(size, self.found.get(name, {})) for name, size in self.sizes.items()}


@dataclass
class _Fetch:
    artefact_id: str
    task: asyncio.Task[None]
    waiting: int = 0


class Stored:
    """The way of one agent's templates into artefact stores and out of them."""

    def __init__(self, machine: Machine, templates: Templates, contents: Contents) -> None:
        self._machine = machine
        self._templates = templates
        self._contents = contents
        self._fetches: dict[str, _Fetch] = {}

    async def close(self) -> None:
        """End what is fetched."""
        tasks = [each.task for each in self._fetches.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # In.

    def push(self, name: str, place: Place) -> AsyncGenerator[Progress | Pushed, None]:
        """Store a template; its last word is what came of it. Closing it ends it.

        Raises NotFound, Invalid, DiskFull, Denied, Unavailable.
        """
        return self._store(partial(self._contents.open, name), place, lambda: None)

    def push_sandbox(
        self, sandbox: Sandbox, place: Place
    ) -> AsyncGenerator[Progress | Pushed, None]:
        """Store what a paused sandbox sleeps in, as `push` does.

        Raises also Conflict when it has checkpoints, or does not sleep on to the end.
        """
        moment = sandbox.asleep()[0].manifest.created_at

        def check() -> None:
            # Whoever woke it up has written to its layer.
            if sandbox.asleep()[0].manifest.created_at != moment:
                raise Conflict(f"sandbox {sandbox.sandbox_id} was resumed while it was stored")

        return self._store(partial(self._contents.open_asleep, sandbox), place, check)

    async def _store(
        self, open_parts: _Open, place: Place, check: Callable[[], None]
    ) -> AsyncGenerator[Progress | Pushed, None]:
        with contextlib.ExitStack() as stack:
            texts, opened = await open_parts(stack)
            work = await asyncio.to_thread(_work, texts, opened)
            sizes = {name: len(text) for name, text in texts.items()}
            sizes |= {name: os.fstat(file).st_size for name, file in opened.items()}
            push = _Push(place.store, sizes, len(work))
            working = self._push(push, work, texts, opened, place, check)
            pushing = asyncio.create_task(working, name="push")
            try:
                while not (await asyncio.wait({pushing}, timeout=_TELL_S))[0]:
                    yield push.progress
                yield pushing.result()
            finally:
                pushing.cancel()
                await asyncio.wait({pushing})

    async def _push(
        self,
        push: _Push,
        work: Iterable[tuple[str, int]],
        texts: Mapping[str, bytes],
        opened: Mapping[str, int],
        place: Place,
        check: Callable[[], None],
    ) -> Pushed:
        async def one(part: str, number: int) -> None:
            if part in texts:
                content: bytes | bytearray | None = _piece(texts[part], number)
            else:
                length = min(CHUNK_BYTES, push.sizes[part] - number * CHUNK_BYTES)
                # Not left behind when it is cancelled: its file is closed then.
                content = await to_its_end(
                    asyncio.to_thread(read_chunk, opened[part], number, length, CHUNK_BYTES)
                )
            await push.add(part, number, content)

        await _at_once(one(part, number) for part, number in work)
        self._machine.step("stored:chunks")
        check()
        made = Manifest(push.parts())
        made = Manifest(made.parts, place.signer.sign(made.signed))
        artefact_id = await manifest.write(place.store, made)
        return Pushed(
            artefact_id=artefact_id, size_bytes=made.size_bytes, added_bytes=push.added_bytes
        )

    # Out.

    async def fetch(self, name: str, artefact_id: str, place: Place) -> None:
        """Make a template of an artefact, together with all who ask for it just now.

        Raises Invalid for one that is damaged or gone, AlreadyExists, Exhausted, DiskFull, Denied,
        Unavailable; Conflict when it does not run here.
        """
        fetch = self._fetches.get(name)
        if fetch is None:
            work = self._fetch(name, artefact_id, place)
            fetch = _Fetch(artefact_id, asyncio.create_task(work, name=f"fetch {name}"))
            self._fetches[name] = fetch
        elif fetch.artefact_id != artefact_id:
            raise Conflict(f"template {name!r} is being fetched from another artefact")
        fetch.waiting += 1
        try:
            await asyncio.shield(fetch.task)
        finally:
            fetch.waiting -= 1
            if not fetch.waiting:
                # Whoever comes now begins anew.
                del self._fetches[name]
                fetch.task.cancel()
                await asyncio.wait({fetch.task})

    async def _fetch(self, name: str, artefact_id: str, place: Place) -> None:
        path = self._templates.new(name)
        async with self._machine.storage.snapshots.draft(path) as draft:
            with files.space_errors(path):
                made = await manifest.read(place.store, artefact_id)
                _check_signature(place.signer, made, artefact_id)
                self._check_room(path, made)
                received = await self._receive(draft, made, place.store)
                self._machine.step("stored:received")
                # What has come this far is put in its place, or taken back, whoever waits.
                await to_its_end(self._contents.place(name, path, draft, received))

    def _check_room(self, path: Path, made: Manifest) -> None:
        floor_mb = self._machine.settings.disk_floor_mb
        disk.check_free(path.parent, floor_mb + made.size_bytes // _MB)

    async def _receive(self, draft: Draft, made: Manifest, store: Store) -> Received:
        """All parts, the small ones first: they say whether it runs here. Raises Invalid."""
        received = Received(digests={name: part.digest for name, part in made.parts.items()})
        limits = {name: limit_of(name) for name in made.parts}
        for name, limit in limits.items():
            if limit is not None:
                received.take(name, await _read_whole(store, made.parts[name], limit, name))
        if MANIFEST not in made.parts:
            raise Invalid("the artefact does not say what it is")
        self._contents.check_runs_here(received)
        (draft.path / "layers").mkdir(mode=0o700)
        with contextlib.ExitStack() as stack:
            opened = {
                name: stack.enter_context(new_file(draft, name))
                for name, limit in limits.items()
                if limit is None
            }
            await _fill(store, {name: made.parts[name] for name in opened}, opened)
        return received


def _check_signature(signer: Signer, made: Manifest, artefact_id: str) -> None:
    what = f"artefact {artefact_id[:12]}"
    try:
        signer.check(made.signed, made.signature, Path(what))
    except Invalid as error:
        raise Invalid(f"{what} was not made by a host of this platform, or was changed") from error


async def _fill(store: Store, parts: Mapping[str, Part], opened: Mapping[str, int]) -> None:
    """Write parts to empty files. Raises Invalid, OSError, Unavailable, Denied."""

    async def one(name: str, number: int, digest: str) -> None:
        content = await _chunk(store, parts[name], number, digest)
        place = opened[name], number * CHUNK_BYTES
        await to_its_end(asyncio.to_thread(write_chunk, *place, content))

    for name, file in opened.items():
        await asyncio.to_thread(os.ftruncate, file, parts[name].size_bytes)
    await _at_once(
        one(name, number, digest)
        for name, part in parts.items()
        for number, digest in sorted(part.chunks.items())
    )


async def _read_whole(store: Store, part: Part, limit: int, name: str) -> bytes:
    if part.size_bytes > limit:
        raise Invalid(f"{name} in the artefact is larger than {limit} bytes")
    content = bytearray(part.size_bytes)
    for number, digest in part.chunks.items():
        piece = await _chunk(store, part, number, digest)
        content[number * CHUNK_BYTES : number * CHUNK_BYTES + len(piece)] = piece
    return bytes(content)


async def _chunk(store: Store, part: Part, number: int, digest: str) -> bytes:
    content = await chunks.get(store, digest)
    if len(content) != part.length(number):
        raise Invalid(f"chunk {digest[:12]} of the artefact is not as long as it should be")
    return content


def _work(texts: Mapping[str, bytes], opened: Mapping[str, int]) -> list[tuple[str, int]]:
    """The chunks that may hold something, by part and number."""
    whole = {name: range(-(-len(text) // CHUNK_BYTES)) for name, text in texts.items()}
    sparse = {name: chunks_with_data(file, CHUNK_BYTES) for name, file in opened.items()}
    found: dict[str, Iterable[int]] = {**whole, **sparse}
    return [(name, number) for name, numbers in found.items() for number in numbers]


def _piece(text: bytes, number: int) -> bytes:
    return text[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]


async def _at_once(works: Iterable[Awaitable[None]]) -> None:
    """Do some of all this at a time, none of it begun earlier; the first error ends it all."""
    left: Iterator[Awaitable[None]] = iter(works)

    async def worker() -> None:
        for work in left:
            await work

    workers = [asyncio.create_task(worker()) for _ in range(_AT_ONCE)]
    try:
        await asyncio.gather(*workers)
    finally:
        for each in workers:
            each.cancel()
        await asyncio.wait(workers)
