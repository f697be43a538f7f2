"""Artefact stores of tests: a folder, and a real S3 server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sandmartin.artefacts.store import Store
from tests import s3

KINDS = ("folder", pytest.param("s3", marks=pytest.mark.s3))


@dataclass
class TestStore:
    """A store, and the directory in which its objects are files."""

    __test__ = False

    url: str
    objects: Path
    server: s3.Server | None = None

    def open(self) -> Store:
        return Store.open(self.url)

    def files(self, prefix: str = "") -> list[Path]:
        """Its objects, as files."""
        found = (path for path in (self.objects / prefix).rglob("*") if path.is_file())
        return sorted(found)


@contextlib.contextmanager
def store_of(kind: str, directory: Path) -> Iterator[TestStore]:
    """A fresh store; of a server, as the environment says where it is."""
    if kind == "folder":
        yield TestStore(f"file://{directory}/store", directory / "store")
        return
    with s3.running_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield TestStore(server.url, server.objects, server)
