"""Layers of images that were fetched from registries, kept to be used again.

A blob is known by its digest, which is computed anew whenever it goes in or out: one that is
damaged is as good as none. Blobs that were fetched with a password are for whoever shows the same
one again, to the same repository: to know a digest is no right to what has it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


def hex_of(digest: str) -> str | None:
    """The digits of a SHA-256 digest; None when it is none."""
    found = _DIGEST.fullmatch(digest)
    return found and found[1]


class Blobs:
    """The blobs below a directory, of `budget_bytes` in all, the least recently used removed."""

    def __init__(self, directory: Path, budget_bytes: int) -> None:
        self._directory = directory
        self._budget_bytes = budget_bytes

    def lend(self, scope: str, digest: str, target: Path) -> bool:
        """Have a blob as `target` too, read-only and root's; False when there is no whole one.

        Takes as long as reading it does.
        """
        name = hex_of(digest)
        if name is None:
            return False
        path = self._directory / scope / name
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            if _sha256(handle) != name:
                path.unlink(missing_ok=True)
                return False
            os.utime(handle)
            _link(handle, target)
        finally:
            os.close(handle)
        return True

    def keep(self, scope: str, digest: str, handle: int) -> None:
        """Keep the blob in a file that a stranger's program made, if it is what it should be.

        The file becomes root's. Takes as long as reading it does.
        """
        name = hex_of(digest)
        if name is None or os.fstat(handle).st_nlink != 1 or _sha256(handle) != name:
            return
        os.fchown(handle, 0, 0)
        os.fchmod(handle, 0o444)
        place = self._directory / scope
        place.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            _link(handle, place / name)
        self._trim()

    def _trim(self) -> None:
        found = [(path, path.stat()) for path in self._directory.glob("*/*")]
        left_bytes = self._budget_bytes
        for path, status in sorted(found, key=lambda each: each[1].st_mtime, reverse=True):
            left_bytes -= status.st_blocks * 512
            if left_bytes < 0:
                path.unlink(missing_ok=True)
        for scope in self._directory.iterdir():
            with contextlib.suppress(OSError):
                scope.rmdir()


def _sha256(handle: int) -> str:
    with os.fdopen(os.dup(handle), "rb") as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _link(handle: int, target: Path) -> None:
    # By the descriptor: a name could have come to be another file's. It is followed only where
    # a directory is named, which an absolute path does without.
    os.link(f"/proc/self/fd/{handle}", target, src_dir_fd=handle, follow_symlinks=True)
