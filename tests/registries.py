"""A real registry of images, on loopback: Debian's docker-registry."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from tests.ociimages import OciImage
from tests.waiting import until

USERNAME, PASSWORD = "reader", "correct horse"
#: htpasswd of the two, by bcrypt.
_HTPASSWD = "reader:$2y$04$abcdefghijklmnopqrstuujydOTSfIH/d5oUHpsygqV5X9xJLQc6e\n"


@dataclass
class Registry:
    """A registry that runs."""

    address: str
    directory: Path
    protected: bool = False

    def push(self, image: OciImage, name: str) -> str:
        """Put an image there; the reference by which it is found."""
        archive = self.directory / "pushed.tar"
        archive.write_bytes(image.archive())
        whom = [f"--dest-creds={USERNAME}:{PASSWORD}"] if self.protected else []
        command = ["skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false", *whom]
        target = f"docker://{self.address}/{name}"
        subprocess.run(
            [*command, f"oci-archive:{archive}", target], check=True, capture_output=True
        )
        return f"{self.address}/{name}"

    def blob(self, digest: str) -> Path:
        """The file that has a blob."""
        name = digest.removeprefix("sha256:")
        place = self.directory / "docker/registry/v2/blobs/sha256" / name[:2]
        return place / name / "data"


@contextlib.asynccontextmanager
async def registry(directory: Path, *, protected: bool = False) -> AsyncIterator[Registry]:
    """A registry with its files in a directory; one that is protected knows one user."""
    address = f"127.0.0.1:{_free_port()}"
    lines = ["version: 0.1", f"http: {{addr: '{address}'}}"]
    lines.append(f"storage: {{filesystem: {{rootdirectory: '{directory}'}}}}")
    if protected:
        passwords = directory / "htpasswd"
        passwords.write_text(_HTPASSWD)
        lines.append(f"auth: {{htpasswd: {{realm: tests, path: '{passwords}'}}}}")
    configuration = directory / "config.yml"
    configuration.write_text("\n".join(lines))
    with (directory / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            "docker-registry", "serve", configuration, stdout=log, stderr=log
        )
    try:
        await until(lambda: _listens(address), "a registry")
        yield Registry(address, directory, protected)
    finally:
        process.kill()
        await process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listens(address: str) -> bool:
    host, _, port = address.partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0
