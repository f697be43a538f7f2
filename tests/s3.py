"""A real S3 server of the tests' own: versitygw on a directory, built from the Go module proxy.

`python -m tests.s3` builds it, once for all clones of this machine; without it tests say so.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MODULE = "github.com/versity/versitygw/cmd/versitygw"
_VERSION = "v1.8.0"
_CACHE = Path(os.environ.get("SANDMARTIN_ASSETS_DIR", "/var/cache/sandmartin"))
BUCKET = "artefacts"
_READY_S = 20.0


def binary() -> Path:
    """Where the server is, or is to be."""
    return _CACHE / f"versitygw-{_VERSION}"


def build() -> None:
    """Build the server if it is not there. Needs `go` on the path."""
    target = binary()
    if target.exists():
        return
    print(f"building {_MODULE} {_VERSION}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {"GOBIN": directory, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
        words = ["go", "install", "-trimpath", "-ldflags=-s -w", f"{_MODULE}@{_VERSION}"]
        subprocess.run(words, check=True, env=environment, cwd=directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.move(Path(directory, "versitygw"), beside)
        beside.rename(target)


@dataclass
class Server:
    """A server, and what its clients need to know."""

    directory: Path
    port: int
    access_key: str = "sandmartin"
    secret_key: str = "a-secret-of-the-tests"
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}/platform"

    @property
    def objects(self) -> Path:
        """The directory in which its objects are files."""
        return self.directory / "data" / BUCKET / "platform"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT": f"http://127.0.0.1:{self.port}",
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Serve; comes back once it does."""
        (self.directory / "data" / BUCKET).mkdir(parents=True, exist_ok=True)
        (self.directory / "meta").mkdir(exist_ok=True)
        secrets = {"ROOT_ACCESS_KEY": self.access_key, "ROOT_SECRET_KEY": self.secret_key}
        words: list[str | Path] = [binary(), "--quiet", "--port", f"127.0.0.1:{self.port}", "posix"]
        words += ["--sidecar", self.directory / "meta", self.directory / "data"]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | secrets
            )
        until = time.monotonic() + _READY_S
        while not self._answers():
            assert self.process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < until, "the S3 server does not answer"
            time.sleep(0.02)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    """A server for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="sms3-", dir="/var/tmp") as directory:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        server = Server(Path(directory), port)
        server.start()
        try:
            yield server
        finally:
            server.kill()


if __name__ == "__main__":
    build()
