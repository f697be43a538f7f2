"""Images of registries and archives become templates, whose sandboxes run."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from sandmartin.agent.proc import clean_environment
from sandmartin.errors import AlreadyExists, Denied, Invalid, NotFound, ToolFailed, Unavailable
from sandmartin.model import Settings
from sandmartin.transport import ImportedImage, ImportProgress, RegistryAuth
from tests import world
from tests.ociimages import OciImage, device, directory, hard_link, member, symlink, tar
from tests.registries import PASSWORD, USERNAME, Registry, registry
from tests.vm.conftest import RunningAgent, execute, run_agent
from tests.waiting import until

pytestmark = pytest.mark.registry

BUSYBOX = Path("/bin/busybox")
APPLETS = ("sh", "cat", "id", "ls", "mkdir", "echo", "stat", "grep", "uname", "env", "true")
#: A registry that leads elsewhere.
ROGUE = "127.0.0.1:5999"
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
async def protected(
    private_host: None, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Registry]:
    async with registry(tmp_path_factory.mktemp("protected"), protected=True) as protected:
        yield protected


@pytest.fixture(scope="module")
async def agent(
    settings: Settings, internet: world.Internet, images: Registry, protected: Registry
) -> AsyncIterator[RunningAgent]:
    """The module's agent, which may ask the registry on loopback."""
    allowed = replace(
        settings,
        registries_private="127.0.0.1/32",
        registries_plain=f"{images.address},{protected.address},{ROGUE}",
    )
    async with run_agent(allowed) as agent:
        yield agent


async def fetch(
    agent: RunningAgent, reference: str, name: str, auth: RegistryAuth | None = None
) -> tuple[str, ImportedImage]:
    """What was told meanwhile, and what came."""
    importing = agent.transport.import_image(reference, name, auth)
    *progress, image = [event async for event in importing]
    told = "\n".join(each.message for each in progress if isinstance(each, ImportProgress))
    assert isinstance(image, ImportedImage)
    return told, image


async def bring(agent: RunningAgent, content: bytes, name: str) -> ImportedImage:
    return await agent.transport.import_archive(name, pieces(content))


def inspect(agent: RunningAgent, name: str, *commands: str) -> str:
    """What debugfs says of a template's disk."""
    image = agent.settings.data_dir / "images" / name / "rootfs.ext4"
    script = "\n".join(commands).encode()
    done = subprocess.run(["debugfs", "-f", "-", image], input=script, capture_output=True)
    return done.stdout.decode()


def drafts(agent: RunningAgent) -> list[Path]:
    """What imports have not given back."""
    return [each for each in (agent.settings.data_dir / "images").iterdir() if each.name[0] == "."]


async def names(agent: RunningAgent) -> set[str]:
    return {each.name for each in await agent.transport.list_templates()}


async def pieces(content: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(content), 1 << 20):
        yield content[at : at + (1 << 20)]


async def test_an_alpine_like_image_of_a_registry_runs(
    agent: RunningAgent, images: Registry
) -> None:
    made = alpine_like()
    told, image = await fetch(agent, images.push(made, "team/alpine:1"), "alpine")
    assert "2 of 2 layers to fetch" in told
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


async def test_layers_are_fetched_once_and_never_believed(
    agent: RunningAgent, images: Registry
) -> None:
    reference = images.push(small(), "team/small:1")
    told, image = await fetch(agent, reference, "first")
    assert "1 of 1 layers to fetch" in told
    told, again = await fetch(agent, f"{reference.rpartition(':')[0]}@{image.digest}", "second")
    assert "0 of 1 layers to fetch" in told
    assert again.digest == image.digest
    (blob,) = (
        path
        for path in (agent.settings.data_dir / "blobs/public").iterdir()
        if path.name in small().blobs
    )
    blob.chmod(0o644)
    blob.write_bytes(b"something else")
    told, _ = await fetch(agent, reference, "third")
    assert "1 of 1 layers to fetch" in told
    for name in ("first", "second", "third"):
        assert "kept" in inspect(agent, name, "cat /file")
        await agent.transport.delete_snapshot(name)
    assert not drafts(agent)


async def test_images_of_dockers_form_keep_their_digest(
    agent: RunningAgent, images: Registry
) -> None:
    reference = images.push(small(), "team/docker:1", "v2s2")
    _, image = await fetch(agent, reference, "docker")
    assert image.digest == images.manifest_digest("team/docker", "1") != small().digest
    assert "kept" in inspect(agent, "docker", "cat /file")
    await agent.transport.delete_snapshot("docker")


async def test_of_an_index_the_image_for_this_machine_is_taken(
    agent: RunningAgent, images: Registry
) -> None:
    images.push(small(), "team/many:one")
    other = OciImage([tar([member("file", b"another")])])
    images.push(other, "team/many:other")
    both = {"arm64": other.digest, "amd64": small().digest}
    _, image = await fetch(agent, images.push_index("team/many", "all", both), "many")
    assert image.digest == small().digest
    await agent.transport.delete_snapshot("many")
    lacking = images.push_index("team/many", "lacking", {"arm64": other.digest})
    with pytest.raises(Invalid, match="linux/amd64"):
        await fetch(agent, lacking, "many")


def small() -> OciImage:
    return OciImage([tar([member("file", b"kept")])])


async def test_a_distroless_archive_runs(agent: RunningAgent, tmp_path: Path) -> None:
    source = tmp_path / "main.go"
    source.write_text('package main\nimport "fmt"\nfunc main() { fmt.Println("alone") }\n')
    env = clean_environment({"CGO_ENABLED": "0"})
    go = Path(sys.executable).with_name("go")
    subprocess.run([go, "build", "-o", tmp_path / "app", source], env=env, check=True)
    layer = tar([member("app", (tmp_path / "app").read_bytes(), mode=0o755)])
    made = OciImage([layer], {"Entrypoint": ["/app"]})
    image = await bring(agent, gzip.compress(made.archive(), 1), "distroless")
    assert (image.digest, image.entrypoint) == (made.digest, ("/app",))
    async with agent.sandbox(template="distroless") as sandbox:
        assert (await execute(sandbox, "/app")).text == "alone\n"
    await agent.transport.delete_snapshot("distroless")


async def test_owners_modes_and_whiteouts_are_those_of_the_layers(agent: RunningAgent) -> None:
    capable = member("capable", b"x", mode=0o4755, uid=1000, gid=65535)
    capability = "\1\0\0\2\0\40\0\0" + "\0" * 12
    capable[0].pax_headers = {
        "SCHILY.xattr.user.word": "value",
        "SCHILY.xattr.security.capability": capability,
    }
    below = [
        directory("a"),
        member("a/one", b"1"),
        member("a/two", b"2"),
        hard_link("a/link", "a/one"),
    ]
    below += [capable, directory("opaque"), member("opaque/old", b"old"), directory("dev")]
    below += [device("dev/null", 1, 3), member("pipe", type=tarfile.FIFOTYPE)]
    above = [member("a/.wh.two"), member("opaque/.wh..wh..opq"), member("opaque/new", b"new")]
    made = OciImage([tar(below), tar(above)])
    image = await bring(agent, made.docker_archive(), "exact")
    assert image.digest.startswith("sha256:")
    said = inspect(
        agent, "exact", "stat /capable", "stat /a/one", "ls /a", "ls /opaque", "stat /pipe"
    )
    assert "Mode:  04755" in said
    assert "User:  1000   Group: 65535" in said
    assert "security.capability (20) = 01 00 00 02 00 20" in said
    assert 'user.word (5) = "value"' in said
    assert "Links: 2" in said
    assert "link" in said
    assert "two" not in said
    assert "new" in said
    assert "old" not in said
    assert "Type: FIFO" in said
    await agent.transport.delete_snapshot("exact")


async def test_what_climbs_out_of_an_image_stays_in_it(agent: RunningAgent) -> None:
    marks = ("climbed", "absolute", "through", "linked")
    made = OciImage(
        [
            tar(
                [
                    member("../../../../../../climbed", b"1"),
                    member("/absolute", b"2"),
                    symlink("out", "/../../../../../.."),
                    member("out/through", b"3"),
                    symlink("host", "/etc"),
                    hard_link("linked", "../../../../../../../../etc/hostname"),
                ][: 4 + 1]
            ),
            tar([member("host/passwd", b"4")]),
        ]
    )
    before = Path("/etc/passwd").read_bytes()
    await bring(agent, made.archive(), "inside")
    assert not any(Path(f"/{mark}").exists() for mark in marks)
    assert Path("/etc/passwd").read_bytes() == before
    said = inspect(
        agent, "inside", "cat /climbed", "cat /absolute", "cat /through", "cat /etc/passwd"
    )
    assert all(each in said for each in "1234")
    await agent.transport.delete_snapshot("inside")


def _of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    return OciImage([tar(members)]).archive()


def _changed(made: OciImage) -> bytes:
    """An archive in which a layer is not what its digest says."""
    archive = made.archive()
    at = archive.index(made.packed[0]) + len(made.packed[0]) - 6
    return archive[:at] + bytes([archive[at] ^ 1]) + archive[at + 1 :]


REFUSED = {
    "owner": (_of(member("far", b"1", uid=100_000)), "far"),
    "device": (_of(directory("srv"), device("srv/disk", 8, 0)), "srv/disk"),
    "link": (_of(hard_link("linked", "/etc/hostname")), "linked"),
    "none": (b"no archive at all" * 1000, "no image"),
    "empty": (b"", "no image"),
    "cut": (small().archive()[:5000], "archive"),
    "changed": (_changed(small()), "did not match|digest|checksum"),
    "deep": (_of(directory("d/" * 3000)), "too long"),
    "layer": (OciImage([b"no tar" * 500]).archive(), "unpack"),
}


@pytest.mark.parametrize("kind", REFUSED)
async def test_a_bad_archive_is_refused_and_leaves_nothing(agent: RunningAgent, kind: str) -> None:
    content, word = REFUSED[kind]
    before = await names(agent)
    with pytest.raises(Invalid, match=word) as refusal:
        await bring(agent, content, "bad")
    assert str(agent.settings.data_dir) not in refusal.value.message
    assert await names(agent) == before
    assert not drafts(agent)


async def test_an_image_nested_as_deep_as_can_be_is_removed_again(agent: RunningAgent) -> None:
    try:
        await bring(agent, _of(directory("d/" * 1500), member("file", b"1")), "deep")
    except ToolFailed:
        # Releases of mke2fs end in the middle of it.
        assert "deep" not in await names(agent)
    else:
        await agent.transport.delete_snapshot("deep")
    assert not drafts(agent)


async def test_a_name_that_is_taken_is_refused_first(agent: RunningAgent) -> None:
    with pytest.raises(AlreadyExists):
        await bring(agent, small().archive(), "base")
    with pytest.raises(AlreadyExists):
        await fetch(agent, "127.0.0.1:1/none", "base")
    with pytest.raises(Invalid):
        await bring(agent, small().archive(), "../up")


async def test_a_password_is_needed_and_never_told(
    agent: RunningAgent, protected: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    reference = protected.push(small(), "team/secret:1")
    wrong = RegistryAuth(USERNAME, "wr0ng-passw0rd")
    for auth in (None, wrong):
        with pytest.raises(Denied) as refusal:
            await fetch(agent, reference, "secret", auth)
        assert wrong.password not in f"{refusal.value} {refusal.value.hint}"
    right = RegistryAuth(USERNAME, PASSWORD)
    told, _ = await fetch(agent, reference, "secret", right)
    # What others may have by the same digest is not for who asks here, nor the other way round.
    assert "1 of 1 layers to fetch" in told
    await agent.transport.delete_snapshot("secret")
    told, _ = await fetch(agent, reference, "secret", right)
    assert "0 of 1 layers to fetch" in told
    await agent.transport.delete_snapshot("secret")
    kept = [*agent.settings.data_dir.rglob("*")]
    assert not any(PASSWORD in text for text in (told, caplog.text, repr(right), repr(kept)))


async def test_registries_that_cannot_be_used_say_why(
    agent: RunningAgent, images: Registry
) -> None:
    for reference, kind in {
        "127.0.0.1:1/team/none": Unavailable,
        f"{images.address}/team/none": NotFound,
        "169.254.169.254/latest/meta-data": Denied,
        f"{world.PRIVATE_SERVER}:{world.TCP_PORT}/team/none": Denied,
        "127.0.0.2:5000/team/none": Denied,
        "https://registry.example/none": Invalid,
    }.items():
        with pytest.raises(kind):
            await fetch(agent, reference, "none")
    assert "none" not in await names(agent)
    assert not drafts(agent)


@pytest.mark.parametrize("harm", ["changed", "cut"])
async def test_a_damaged_layer_in_a_registry_is_never_taken(
    agent: RunningAgent, images: Registry, harm: str
) -> None:
    made = OciImage([tar([member("file", harm.encode() * 5000)])])
    reference = images.push(made, f"team/{harm}:1")
    (digest,) = (name for name, content in made.blobs.items() if content == made.packed[0])
    blob, whole = images.blob(digest), made.packed[0]
    blob.write_bytes(whole[:-3] if harm == "cut" else whole[:-3] + bytes(3))
    with pytest.raises(Unavailable):
        await fetch(agent, reference, "damaged")
    blob.write_bytes(whole)
    told, _ = await fetch(agent, reference, "damaged")
    assert "1 of 1 layers to fetch" in told
    await agent.transport.delete_snapshot("damaged")


async def test_a_registry_leads_nowhere_else(agent: RunningAgent) -> None:
    """One that sends on to a metadata service learns nothing of it."""
    asked = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.read(1000))
        place = f"http://{world.METADATA_SERVER}:{world.TCP_PORT}/"
        writer.write(f"HTTP/1.1 307 There\r\nLocation: {place}\r\n".encode())
        writer.write(b"Content-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    host, _, port = ROGUE.partition(":")
    async with await asyncio.start_server(answer, host, int(port)):
        with pytest.raises(Unavailable) as refusal:
            await fetch(agent, f"{ROGUE}/team/rogue", "rogue")
    assert asked
    assert world.BANNER.decode().strip() not in refusal.value.message


@pytest.mark.parametrize("phase", ["asking", "to fetch", "unpacking", "making"])
async def test_who_stops_listening_ends_an_import(
    agent: RunningAgent, images: Registry, phase: str
) -> None:
    reference = images.push(alpine_like(), "team/alpine:1")
    seen = False
    async with aclosing(agent.transport.import_image(reference, "ended")) as events:
        async for event in events:
            if isinstance(event, ImportProgress) and phase in event.message:
                seen = True
                break
    assert seen
    await until(lambda: not drafts(agent), "the end of an import")
    assert "ended" not in await names(agent)


async def test_an_archive_that_breaks_off_leaves_nothing(agent: RunningAgent) -> None:
    begun = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield alpine_like().archive()[:10_000]
        begun.set()
        await asyncio.Event().wait()

    sending = asyncio.create_task(agent.transport.import_archive("broken", slowly()))
    await begun.wait()
    await until(lambda: bool(drafts(agent)), "the begin of an import")
    sending.cancel()
    await asyncio.wait({sending})
    await until(lambda: not drafts(agent), "the end of an import")
    assert "broken" not in await names(agent)


@pytest.mark.full
async def test_what_does_not_fit_a_disk_is_refused(agent: RunningAgent) -> None:
    info = tarfile.TarInfo("bomb")
    info.size = 6 << 30
    block = gzip.compress(bytes(1 << 20))
    layer = gzip.compress(info.tobuf()) + block * (6 << 10) + gzip.compress(bytes(1024))
    bomb = OciImage([b""], packed=[layer])
    with pytest.raises(Invalid, match="larger than 5120 MB"):
        await bring(agent, bomb.archive(), "bomb")
    assert not drafts(agent)
