"""The files of a build context, as a table of paths, and what a COPY takes of them.

A path is relative, with slashes, normalised. What a file is known by is its kind, mode and
content, never its time or owner, so the same files have the same digest on every machine. A tree
is always written as the same bytes: sorted, time 0, owner 0.
"""

from __future__ import annotations

import hashlib
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import IO

from sandmartin.context.patterns import Pattern, is_pattern
from sandmartin.context.source import InvalidBuild, Position, quoted

_MOST_LINKS_FOLLOWED = 40
#: Characters of paths that the patterns of one COPY are tried on: some seconds of work.
_MOST_LOOKED_AT = 2 * 10**7
_DIRECTORY_MODE = 0o755
#: Names by which an archive is known that Docker's ADD would unpack.
_ARCHIVES = (
    ".tar",
    *(f".tar.{each}" for each in ("gz", "bz2", "xz", "zst")),
    *(".tgz", ".tbz", ".tbz2", ".txz"),
)


class Kind(StrEnum):
    """What a path is."""

    FILE = "file"
    DIRECTORY = "directory"
    LINK = "link"


@dataclass(frozen=True)
class Entry:
    """One path of a context. `mode` has the permission bits alone."""

    kind: Kind
    mode: int
    #: Of a file: its length, and the SHA-256 of its content in hex.
    size_bytes: int = 0
    sha256: str = ""
    #: Of a link: where it leads, as it was written.
    target: str = ""

    def digest(self) -> bytes:
        words = (self.kind, f"{self.mode:o}", str(self.size_bytes), self.sha256, self.target)
        return hashlib.sha256("\0".join(words).encode()).digest()


@dataclass(frozen=True)
class Taken:
    """One path that a COPY takes: where it is in the context, and where it goes."""

    path: str
    #: Below the destination; empty when the destination itself is this file or directory.
    to: str
    entry: Entry


@dataclass(frozen=True)
class Selection:
    """All that one COPY takes, sorted by where it goes."""

    taken: tuple[Taken, ...]
    #: Whether it can only go into a directory: there are several sources, or one is a directory.
    needs_directory: bool

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of all that is taken, with its modes and the places it goes to."""
        whole = hashlib.sha256(b"directory" if self.needs_directory else b"file")
        for each in self.taken:
            whole.update(f"\0{each.to}\0".encode() + each.entry.digest())
        return whole.hexdigest()

    @property
    def size_bytes(self) -> int:
        return sum(each.entry.size_bytes for each in self.taken)


class Tree:
    """A context's paths. Directories that nobody named are there all the same."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(entries)
        self._looked_at = 0
        for path in entries:
            self._add_above(path)

    def _add_above(self, path: str) -> None:
        while path := posixpath.dirname(path):
            above = self.entries.setdefault(path, Entry(Kind.DIRECTORY, _DIRECTORY_MODE))
            if above.kind is not Kind.DIRECTORY:
                raise InvalidBuild(
                    f"the context has files below {quoted(path)}, which is a {above.kind}",
                    text=path,
                )

    def select(
        self, sources: Sequence[str], position: Position | None = None, *, archives: bool = True
    ) -> Selection:
        """What a COPY of `sources`, which may be patterns, takes by Docker's rules.

        Of a directory its content is taken, a file by its own name, a link that is named is
        followed within the context. Raises InvalidBuild when there is nothing of that name, two
        sources disagree about a place, or with `archives` false one is an archive.
        """
        self._looked_at = 0
        taken: dict[str, Taken] = {}
        found = [path for source in sources for path in self._find(source, position)]
        files = 0
        for path in found:
            real = self._follow(path, position)
            entry = self._get(real)
            if entry.kind is Kind.DIRECTORY:
                self._take_below(real, taken, position)
                continue
            files += 1
            name = posixpath.basename(path)
            if not archives and name.lower().endswith(_ARCHIVES):
                raise InvalidBuild(
                    f"ADD does not unpack {quoted(name)}",
                    position=position,
                    text=name,
                    hint="copy it with COPY and unpack it with RUN tar",
                )
            _take(taken, Taken(real, name, entry), position)
        ordered = tuple(taken[to] for to in sorted(taken))
        return Selection(ordered, needs_directory=len(found) != 1 or files == 0)

    def _find(self, source: str, position: Position | None) -> list[str]:
        # A path out of the context is one in it: there is nothing above.
        path = posixpath.normpath("/" + source).lstrip("/")
        found = [path] if not path or self._leads_somewhere(path) else []
        if not found and is_pattern(path):
            try:
                pattern = Pattern(path)
            except ValueError as error:
                raise InvalidBuild(
                    f"the pattern {quoted(source)} is malformed: {error}",
                    position=position,
                    text=source,
                ) from error
            found = sorted(filter(pattern.matches, self._candidates(path, position)))
        if not found:
            raise InvalidBuild(
                f"the context has no {quoted(source)}",
                position=position,
                text=source,
                hint="paths are relative to the context; .dockerignore may leave it out",
            )
        return found

    def _candidates(self, pattern: str, position: Position | None) -> list[str]:
        """Paths that `pattern` may match, if they are not too many to be looked at."""
        paths = list(self.entries)
        if "**" not in pattern and "[" not in pattern:
            depth = pattern.count("/")
            paths = [path for path in paths if path.count("/") == depth]
        self._looked_at += sum(map(len, paths))
        if self._looked_at > _MOST_LOOKED_AT:
            raise InvalidBuild(
                "too many patterns for so many files",
                position=position,
                text=pattern,
                hint="name a directory instead",
            )
        return paths

    def _leads_somewhere(self, path: str) -> bool:
        try:
            self._follow(path, None)
        except InvalidBuild:
            return False
        return True

    def _get(self, path: str) -> Entry:
        return self.entries[path] if path else Entry(Kind.DIRECTORY, _DIRECTORY_MODE)

    def _follow(self, path: str, position: Position | None) -> str:
        """Where `path` is once its links are followed; the context is their root."""
        left, real, followed = path.split("/"), "", 0
        while left:
            part = left.pop(0)
            if part in ("", "."):
                continue
            if part == "..":
                real = posixpath.dirname(real)
                continue
            step = f"{real}/{part}" if real else part
            entry = self.entries.get(step)
            followed += entry is not None and entry.kind is Kind.LINK
            if entry is None or followed > _MOST_LINKS_FOLLOWED:
                raise InvalidBuild(
                    f"{quoted(path)} leads nowhere in the context",
                    position=position,
                    text=path,
                    hint="a link must lead to something in the context to be copied by its name",
                )
            if entry.kind is Kind.LINK:
                left[:0] = entry.target.split("/")
                real = "" if entry.target.startswith("/") else real
            elif left and any(left) and entry.kind is Kind.FILE:
                raise InvalidBuild(f"{quoted(step)} is no directory", position=position, text=path)
            else:
                real = step
        return real

    def _take_below(
        self, directory: str, taken: dict[str, Taken], position: Position | None
    ) -> None:
        prefix = f"{directory}/" if directory else ""
        for path, entry in self.entries.items():
            if path.startswith(prefix):
                _take(taken, Taken(path, path[len(prefix) :], entry), position)


def _take(taken: dict[str, Taken], new: Taken, position: Position | None) -> None:
    """The later of two files wins, as if they were copied one after the other."""
    old = taken.get(new.to)
    directories = {each.entry.kind is Kind.DIRECTORY for each in (old, new) if each is not None}
    if len(directories) == 2:
        raise InvalidBuild(
            f"two sources disagree whether {quoted(new.to)} is a directory",
            position=position,
            text=new.to,
            hint="copy them with two instructions",
        )
    taken[new.to] = new


def write_tar(
    out: IO[bytes], entries: Iterable[tuple[str, Entry]], content: Callable[[str], IO[bytes]]
) -> None:
    """Write `entries`, in their order, as a tar; `content` opens a file by its path."""
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for path, entry in entries:
            write_member(tar, path, entry, content)


def write_member(
    tar: tarfile.TarFile, name: str, entry: Entry, content: Callable[[str], IO[bytes]]
) -> None:
    """Add `name` to `tar` with nothing of the machine or the time."""
    member = tarfile.TarInfo(name)
    member.mode = entry.mode
    if entry.kind is Kind.FILE:
        member.size = entry.size_bytes
        with content(name) as file:
            tar.addfile(member, file)
        return
    member.type = tarfile.DIRTYPE if entry.kind is Kind.DIRECTORY else tarfile.SYMTYPE
    member.linkname = entry.target
    tar.addfile(member)
