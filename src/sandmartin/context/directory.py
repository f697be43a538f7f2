"""Packing a directory into a build context: the same files are the same bytes, on any machine.

What `.dockerignore` names stays out, links stay links and are never followed, sockets, pipes and
devices are left out as there is nothing in them to send.
"""

from __future__ import annotations

import gzip
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from sandmartin.context.archive import Limits
from sandmartin.context.patterns import IgnoreRules
from sandmartin.context.source import InvalidBuild, quoted
from sandmartin.context.tree import Entry, Kind, write_member

_IGNORE_BYTES = 2**20


def read_ignore_rules(directory: Path, dockerfile: str = "Dockerfile") -> IgnoreRules:
    """The rules in `DOCKERFILE.dockerignore`, or else `.dockerignore`, or none.

    Raises InvalidBuild for rules that are malformed.
    """
    for name in (f"{dockerfile}.dockerignore", ".dockerignore"):
        file = directory / name
        if not file.is_file():
            continue
        try:
            if file.stat().st_size > _IGNORE_BYTES:
                raise InvalidBuild(f"{name} is larger than {_IGNORE_BYTES} bytes")
            return IgnoreRules(file.read_text(encoding="utf-8"), name)
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidBuild(f"{name} cannot be read: {error}") from error
    return IgnoreRules()


def pack_directory(
    directory: Path,
    out: IO[bytes],
    rules: IgnoreRules | None = None,
    limits: Limits | None = None,
    *,
    compress: bool = True,
) -> int:
    """Write the files in `directory` to `out` as a tar, gzipped with `compress`.

    Returns the size of the content in bytes. Raises InvalidBuild, which names the file, when one
    cannot be read or changes meanwhile, or when there is more than `limits` allow.
    """
    if not directory.is_dir():
        raise InvalidBuild(f"the context {quoted(str(directory))} is no directory")
    limits, rules = limits or Limits(), rules or IgnoreRules()
    if compress:
        # The name and time in gzip's own header would differ each time.
        with gzip.GzipFile(filename="", fileobj=out, mode="wb", compresslevel=6, mtime=0) as zipped:
            return _pack(directory, cast("IO[bytes]", zipped), rules, limits)
    return _pack(directory, out, rules, limits)


def _pack(directory: Path, out: IO[bytes], rules: IgnoreRules, limits: Limits) -> int:
    size_bytes = 0
    found = dict(_entries(directory, rules))
    limits.check_count(len(found))
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(found):
            size_bytes += found[path].size_bytes
            limits.check_size(size_bytes)
            try:
                write_member(tar, path, found[path], lambda path: (directory / path).open("rb"))
            except OSError as error:
                # The library says so, too, when a file has become shorter.
                raise _unreadable(path, error.strerror or "it changed meanwhile") from error
    return size_bytes


def _entries(directory: Path, rules: IgnoreRules) -> Iterator[tuple[str, Entry]]:
    """What is to be packed, in no order."""
    left = [""]
    while left:
        below = left.pop()
        for item in _scan(directory, below):
            path = f"{below}/{item.name}" if below else item.name
            entry = _entry(item, path)
            if entry is None:
                continue
            ignored = rules.ignores(path)
            if not ignored:
                yield path, entry
            if entry.kind is Kind.DIRECTORY and (not ignored or rules.has_exceptions):
                left.append(path)


def _scan(directory: Path, below: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory / below) as found:
            items = list(found)
    except OSError as error:
        raise _unreadable(below or ".", error.strerror) from error
    for item in items:
        try:
            item.name.encode()
        except UnicodeEncodeError:
            raise _unreadable(f"{below}/{item.name}", "its name is not UTF-8") from None
    return items


def _entry(item: os.DirEntry[str], path: str) -> Entry | None:
    try:
        status = item.stat(follow_symlinks=False)
        mode = status.st_mode & 0o7777
        if stat.S_ISLNK(status.st_mode):
            return Entry(Kind.LINK, 0o777, target=Path(item.path).readlink().as_posix())
    except OSError as error:
        raise _unreadable(path, error.strerror) from error
    if stat.S_ISDIR(status.st_mode):
        return Entry(Kind.DIRECTORY, mode)
    if stat.S_ISREG(status.st_mode):
        return Entry(Kind.FILE, mode, status.st_size)
    return None


def _unreadable(path: str, why: str | None) -> InvalidBuild:
    return InvalidBuild(f"{quoted(path)} of the context cannot be packed: {why}", text=path)
