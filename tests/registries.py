"""A real registry of images, on loopback: Debian's docker-registry."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

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

    def push(self, image: OciImage, name: str, form: str = "oci") -> str:
        """Put an image there; the reference by which it is found."""
        archive = self.directory / "pushed.tar"
        archive.write_bytes(image.archive())
        whom = [f"--dest-creds={USERNAME}:{PASSWORD}"] if self.protected else []
        command = ["skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false", *whom]
        command.append(f"--format={form}")
        target = f"docker://{self.address}/{name}"
        subprocess.run(
            [*command, f"oci-archive:{archive}", target], check=True, capture_output=True
        )
        return f"{self.address}/{name}"

    def push_index(self, repository: str, tag: str, digests: Mapping[str, str]) -> str:
        """Put an index of images that are there, by their architecture; its reference."""
        kind = "application/vnd.oci.image.manifest.v1+json"
        root = f"http://{self.address}/v2/{repository}/manifests"
        manifests = []
        for architecture, digest in digests.items():
            size = len(httpx.get(f"{root}/{digest}", headers={"Accept": kind}).content)
            platform = {"os": "linux", "architecture": architecture}
            described = {"mediaType": kind, "digest": digest, "size": size}
            manifests.append({**described, "platform": platform})
        media_type = "application/vnd.oci.image.index.v1+json"
        index = {"schemaVersion": 2, "mediaType": media_type, "manifests": manifests}
        answer = httpx.put(
            f"{root}/{tag}", content=json.dumps(index), headers={"Content-Type": media_type}
        )
        answer.raise_for_status()
        return f"{self.address}/{repository}:{tag}"

    def manifest_digest(self, repository: str, tag: str) -> str:
        """Of what a tag names, as it was put there in Docker's form."""
        kind = "application/vnd.docker.distribution.manifest.v2+json"
        url = f"http://{self.address}/v2/{repository}/manifests/{tag}"
        return httpx.head(url, headers={"Accept": kind}).headers["Docker-Content-Digest"]

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
