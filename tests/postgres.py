"""A real PostgreSQL server of the tests' own, on a socket and port of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import asyncpg

_BINARIES = "/usr/lib/postgresql/*/bin"
_OWNER = "postgres"
_PORT = 54329
#: A database that is lost with the machine need not be synced.
_OPTIONS = ("fsync=off", "full_page_writes=off", "max_connections=200", "listen_addresses=")
#: Faster still, where no test ends the server: what was committed last would be lost.
_CARELESS = ("synchronous_commit=off",)


def find_binaries() -> Path | None:
    """Where the newest installed server is; None when there is none."""
    found = sorted(Path("/").glob(_BINARIES.lstrip("/")))
    return found[-1] if found else None


class Server:
    """A running server."""

    def __init__(self, directory: Path, binaries: Path, options: Sequence[str]) -> None:
        self.directory = directory
        self._binaries = binaries
        self._options = options

    def start(self) -> None:
        options = ["-k", self.directory, "-p", str(_PORT)]
        options += [word for option in self._options for word in ("-c", option)]
        words = " ".join(map(str, options))
        self._control("-l", self.directory / "log", "-o", words, "start")

    def stop(self) -> None:
        """End it as a crash would: with no word to those who are connected."""
        self._control("-m", "immediate", "stop")

    def _control(self, *words: object) -> None:
        _run(self._binaries / "pg_ctl", "-D", self.directory / "data", "-w", *words)

    def url(self, name: str) -> str:
        return f"postgresql://{_OWNER}@/{name}?host={self.directory}&port={_PORT}"

    def execute(self, statement: str) -> None:
        async def run() -> None:
            connection = await asyncpg.connect(
                host=str(self.directory), port=_PORT, user=_OWNER, database="postgres"
            )
            try:
                await connection.execute(statement)
            finally:
                await connection.close()

        asyncio.run(run())

    def create(self, name: str, template: str = "template0") -> str:
        """Make a database and return its URL."""
        self.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return self.url(name)

    def drop(self, name: str) -> None:
        self.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


@contextlib.contextmanager
def running_server(*, careful: bool = False) -> Iterator[Server]:
    """A server for as long as the context lasts; it runs as a user of its own.

    A careful one loses nothing when it is stopped and started.
    """
    binaries = find_binaries()
    assert binaries is not None, "PostgreSQL is not installed"
    directory = Path(tempfile.mkdtemp(prefix="smpg-", dir="/var/tmp"))
    try:
        if os.geteuid() == 0:
            owner = pwd.getpwnam(_OWNER)
            os.chown(directory, owner.pw_uid, owner.pw_gid)
        data = directory / "data"
        _run(binaries / "initdb", "-D", data, "-A", "trust", "-U", _OWNER, "--no-sync")
        server = Server(directory, binaries, _OPTIONS if careful else _OPTIONS + _CARELESS)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _run(*words: object) -> None:
    # The server refuses to run as root.
    as_owner = []
    if os.geteuid() == 0:
        as_owner = ["setpriv", f"--reuid={_OWNER}", f"--regid={_OWNER}", "--init-groups", "--"]
    subprocess.run(
        [*as_owner, *map(os.fspath, words)],  # type: ignore[arg-type]
        cwd="/",
        check=True,
        stdout=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
