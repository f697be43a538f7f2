"""Images of registries and archives become templates, whose sandboxes run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from sandmartin.model import Settings
from sandmartin.transport import ImportedImage, ImportProgress
from tests import world
from tests.ociimages import OciImage, directory, member, symlink, tar
from tests.registries import Registry, registry
from tests.vm.conftest import RunningAgent, execute, run_agent

BUSYBOX = Path("/bin/busybox")
APPLETS = ("sh", "cat", "id", "ls", "mkdir", "echo", "stat", "grep", "uname", "env", "true")
PASSWD = b"root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n"


def alpine_like() -> OciImage:
    """No glibc and no init: busybox, linked under its names, and the usual files."""
    system = tar(
        [
            *(directory(name) for name in ("bin", "etc", "root", "home", "home/app")),
            directory("tmp", mode=0o1777),
            member("bin/busybox", BUSYBOX.read_bytes(), mode=0o755),
            *(symlink(f"bin/{name}", "busybox") for name in APPLETS),
            member(
                "etc/passwd", b"root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n"
            ),
            member("etc/group", b"root:x:0:\napp:x:1000:\n"),
            member("etc/alpine-release", b"3.99\n"),
        ]
    )
    app = tar([member("home/app/hello", b"hello\n", uid=1000, gid=1000, mode=0o640)])
    config = {"Env": ["PATH=/bin", "A=b=c"], "User": "app", "ExposedPorts": {"80/tcp": {}}}
    return OciImage([system, app], {**config, "Cmd": ["sh"], "WorkingDir": "/home/app"})


@pytest.fixture(scope="module")
async def images(
    private_host: None, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Registry]:
    async with registry(tmp_path_factory.mktemp("registry")) as images:
        yield images


@pytest.fixture(scope="module")
async def agent(
    settings: Settings, internet: world.Internet, images: Registry
) -> AsyncIterator[RunningAgent]:
    """The module's agent, which may ask the registry on loopback."""
    allowed = replace(
        settings, registries_private="127.0.0.0/8", registries_plain=images.address, warm=False
    )
    async with run_agent(allowed) as agent:
        yield agent


async def fetch(agent: RunningAgent, reference: str, name: str) -> ImportedImage:
    events = [event async for event in agent.transport.import_image(reference, name)]
    *progress, image = events
    assert all(isinstance(event, ImportProgress) for event in progress)
    assert isinstance(image, ImportedImage)
    return image


async def pieces(content: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(content), 1 << 20):
        yield content[at : at + (1 << 20)]


async def test_an_alpine_like_image_of_a_registry_runs(
    agent: RunningAgent, images: Registry
) -> None:
    made = alpine_like()
    image = await fetch(agent, images.push(made, "team/alpine:1"), "alpine")
    assert image.digest == made.digest
    assert dict(image.envs) == {"PATH": "/bin", "A": "b=c"}
    assert (image.user, image.workdir, image.ports) == ("app", "/home/app", ("80/tcp",))
    assert (image.entrypoint, image.cmd) == ((), ("sh",))
    async with agent.sandbox(template="alpine") as sandbox:
        said = await execute(
            sandbox,
            "/bin/sh",
            "-c",
            "id; cat hello; stat -c %a:%u /home/app/hello",
            user="app",
            cwd="/home/app",
        )
        assert said.text.splitlines()[1:] == ["hello", "640:1000"], said
        assert "uid=1000(app)" in said.text
    await agent.transport.delete_snapshot("alpine")
