"""Files in the guest, by the host agent's client and as the stock SDKs ask for them."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sandmartin.agent.guest import Command, Guest
from sandmartin.errors import (
    Denied,
    DiskFull,
    Invalid,
    NotFound,
    NotStarted,
)
from tests.contract.guests import (
    ME,
    MIB,
    TOKEN,
    RunningAgent,
    collect,
    identity,
    pattern,
    running,
    shell,
    stream,
    wait_until,
)


def status_of(path: str) -> os.stat_result:
    return Path(path).stat()


async def test_64_mib_go_in_and_out_unchanged_in_bounded_memory(
    agent: RunningAgent, guest: Guest, tmp_path: Path
) -> None:
    path = os.fspath(tmp_path / "made" / "on the way" / "ü.bin")
    agent.forget_peak()
    before = agent.peak_bytes()
    sent, received = hashlib.sha256(), hashlib.sha256()
    await guest.upload(path, ME, pattern(64 * MIB, sent))
    assert status_of(path).st_size == 64 * MIB
    async for chunk in guest.download(path, ME):
        received.update(chunk)
    assert received.digest() == sent.digest()
    assert agent.peak_bytes() - before < 32 * MIB


async def test_short_odd_and_endless_files(guest: Guest, tmp_path: Path) -> None:
    empty = os.fspath(tmp_path / "empty")
    await guest.upload(empty, ME, pattern(0))
    assert [chunk async for chunk in guest.download(empty, ME)] == []
    for kernel in ("/proc/self/status", "/sys/kernel/mm/transparent_hugepage/enabled"):
        assert b"".join([chunk async for chunk in guest.download(kernel, ME)])
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(Invalid, match="regular file"):
            await anext(guest.download(os.fspath(path), ME))
        with pytest.raises(Invalid, match="regular file"):
            await guest.upload(os.fspath(path), ME, pattern(MIB))


async def test_what_is_asked_wrongly_about_files_has_its_own_error(
    guest: Guest, tmp_path: Path
) -> None:
    with pytest.raises(NotFound):
        await anext(guest.download(os.fspath(tmp_path / "missing"), ME))
    for path in ("", "a\0b"):
        with pytest.raises(Invalid, match="NUL"):
            await anext(guest.download(path, ME))
        with pytest.raises(Invalid, match="NUL"):
            await guest.upload(path, ME, pattern(MIB))
    with pytest.raises(Invalid, match="nobody-knows-me"):
        await guest.upload(os.fspath(tmp_path / "file"), "nobody-knows-me", pattern(MIB))


async def test_an_upload_whose_source_breaks_leaves_nothing(guest: Guest, tmp_path: Path) -> None:
    async def breaking() -> AsyncIterator[bytes]:
        yield bytes(MIB)
        raise LookupError("the source broke")

    path = tmp_path / "file"
    with pytest.raises(LookupError, match="the source broke"):
        await guest.upload(os.fspath(path), ME, breaking())
    wait_until(lambda: not path.exists())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mounted = tmp_path / "small"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", mounted], check=True)
    yield mounted
    subprocess.run(["umount", mounted], check=True)


@pytest.mark.root
async def test_a_full_disk_is_told_and_given_back(guest: Guest, small_disk: Path) -> None:
    path = small_disk / "file"
    free = os.statvfs(small_disk).f_bfree
    for _ in range(5):
        with pytest.raises(DiskFull, match="not enough disk space") as caught:
            await guest.upload(os.fspath(path), "root", pattern(256 * MIB))
        assert caught.value.hint
        assert not path.exists()
    assert os.statvfs(small_disk).f_bfree == free
    await guest.upload(os.fspath(path), "root", pattern(8 * MIB))
    assert path.stat().st_size == 8 * MIB


@pytest.fixture
def other_users(binary: Path, tmp_path: Path) -> Iterator[RunningAgent]:
    """An agent in a mount namespace of its own, where other accounts are known."""
    # Others than root must get through to where tests work.
    for directory in (tmp_path, *tmp_path.parents[:3]):
        directory.chmod(0o755)
    (tmp_path / "passwd").write_text(
        "root:x:0:0::/root:/bin/sh\n"
        f"ann:x:4242:4243::{tmp_path}/home:/bin/sh\n"
        "user:x:4244:4244::/no/such/home:/bin/sh\n"
    )
    (tmp_path / "group").write_text("ann:x:4243:\nclub:x:4250:bob,ann\nother:x:4251:bob\n")
    for name, mode, uid, gid in (("home", 0o755, 4242, 4243), ("club", 0o770, 0, 4250)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
        os.chown(tmp_path / name, uid, gid)
    # What is mounted here must not be seen outside. Below a chroot the root is no mount of its
    # own and cannot be told so; there it must be private already.
    private = 'mount --make-rprivate / 2>/dev/null || case "$(findmnt -no PROPAGATION -T /etc)" in '
    private += "*shared*) exit 1 ;; esac; "
    inside = 'for f in passwd group; do mount --bind "$0/$f" /etc/$f || exit 1; done; exec "$@"'
    prefix = (
        "unshare",
        "--mount",
        "--propagation=unchanged",
        "sh",
        "-c",
        private + inside,
        os.fspath(tmp_path),
    )
    with running(binary, prefix=prefix) as agent:
        yield agent


@pytest.mark.root
async def test_work_is_done_with_the_rights_of_the_user(
    other_users: RunningAgent, tmp_path: Path
) -> None:
    guest = other_users.client()
    await guest.introduce(identity(), 10)
    command = shell("id -u; id -g; id -G; pwd; echo $HOME $USER", user="ann")
    out, _, _ = await collect(guest.start(command))
    home = f"{tmp_path}/home"
    assert out.decode().splitlines() == ["4242", "4243", "4243 4250", home, f"{home} ann"]

    out, _, _ = await collect(guest.start(shell("pwd", user="user")))
    assert out == b"/\n"

    await guest.upload("mine.txt", "ann", pattern(MIB))
    await guest.upload(f"{tmp_path}/club/by-group", "ann", pattern(MIB))
    made = status_of(f"{home}/mine.txt")
    assert (made.st_uid, made.st_gid) == (4242, 4243)
    with pytest.raises(Denied):
        await guest.upload(f"{tmp_path}/not-hers", "ann", pattern(MIB))
    with pytest.raises(Denied):
        await anext(guest.download(f"{tmp_path}/club/by-group", "user"))
    with pytest.raises(NotStarted, match="ann"):
        await collect(guest.start(Command(cmd="/root/x", user="ann")))
    with pytest.raises(Invalid, match="cwd"):
        await collect(guest.start(shell("true", user="user", cwd=f"{tmp_path}/club")))
    await guest.close()


# As the stock SDKs ask.


def test_the_stock_sdks_file_calls(sdk: httpx.Client, tmp_path: Path) -> None:
    def call(method: str, **message: Any) -> httpx.Response:
        return sdk.post(f"/filesystem.Filesystem/{method}", json=message)

    directory = f"{tmp_path}/a/b"
    assert call("MakeDir", path=directory).json()["entry"]["type"] == "FILE_TYPE_DIRECTORY"
    again = call("MakeDir", path=directory)
    assert (again.status_code, again.json()["code"]) == (409, "already_exists")
    file = {"path": f"{directory}/f.txt", "username": ME}
    octets = {"content-type": "application/octet-stream"}
    written = sdk.post("/files", params=file, content=b"0123456789", headers=octets)
    assert written.json() == [{"path": file["path"], "name": "f.txt", "type": "file"}]
    Path(directory, "link").symlink_to("f.txt")
    Path(os.fsdecode(os.fsencode(directory) + b"/\xff.bin")).touch()

    entry = call("Stat", path=file["path"]).json()["entry"]
    assert entry["size"] == "10"
    assert (entry["mode"], entry["permissions"]) == (0o644, "-rw-r--r--")
    assert (entry["owner"], entry["name"]) == (ME, "f.txt")
    assert entry["modifiedTime"].endswith("Z")
    listed = call("ListDir", path=f"{tmp_path}/a", depth=2).json()["entries"]
    shown = {found["path"]: found for found in listed}
    assert sorted(shown) == [
        f"{directory}{rest}" for rest in ("", "/f.txt", "/link", "/\ufffd.bin")
    ]
    assert shown[f"{directory}/link"]["type"] == "FILE_TYPE_FILE"
    assert shown[f"{directory}/link"]["symlinkTarget"] == file["path"]
    assert len(call("ListDir", path=f"{tmp_path}/a").json()["entries"]) == 1

    moved = call("Move", source=file["path"], destination=f"{tmp_path}/new/place")
    assert moved.json()["entry"]["path"] == f"{tmp_path}/new/place"
    assert call("Move", source=file["path"], destination=f"{tmp_path}/no").status_code == 404
    assert call("Remove", path=f"{tmp_path}/a").json() == {}
    assert call("Remove", path=f"{tmp_path}/a").json() == {}
    assert call("Stat", path=directory).json()["code"] == "not_found"
    assert call("Stat", path="a\0b").json()["code"] == "invalid_argument"


def test_a_signed_url_needs_no_token(agent: RunningAgent, tmp_path: Path) -> None:
    path = tmp_path / "signed"
    path.write_bytes(b"content")

    def get(expires: int, signed_path: str) -> httpx.Response:
        text = f"{signed_path}:read:{ME}:{TOKEN}:{expires}"
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        query = {"path": os.fspath(path), "username": ME, "signature": f"v1_{digest}"}
        return httpx.get(f"{agent.url}/files", params=query | {"signature_expiration": expires})

    now = int(time.time())
    assert get(now + 60, os.fspath(path)).content == b"content"
    assert get(now + 60, "/other").json() == {"code": 401, "message": "invalid signature"}
    expired = get(now - 60, os.fspath(path))
    assert expired.json() == {"code": 401, "message": "signature is already expired"}


@pytest.mark.root
async def test_who_names_no_user_is_the_default_one(
    other_users: RunningAgent, tmp_path: Path
) -> None:
    guest = other_users.client()
    await guest.introduce(identity(), 10)
    await guest.close()
    with httpx.Client(base_url=other_users.url, headers={"X-Access-Token": TOKEN}) as client:

        def who(**headers: str) -> str:
            asked = {"process": {"cmd": "id", "args": ["-un"]}}
            events = stream(client, "process.Process/Start", asked, **headers)
            return base64.b64decode(events[1]["event"]["data"]["stdout"]).decode().strip()

        def introduce(**told: str) -> None:
            assert client.post("/init", json=told).status_code == 200

        assert who() == "user"
        introduce(defaultUser="ann", defaultWorkdir=f"{tmp_path}/club")
        assert who() == "ann"
        assert who(authorization="Basic " + base64.b64encode(b"root:").decode()) == "root"
        form = {"file": ("x", b"1")}
        told = client.post("/files", params={"path": "below"}, files=form).json()
        assert told == [{"path": f"{tmp_path}/club/below", "name": "below", "type": "file"}]
        assert status_of(f"{tmp_path}/club/below").st_uid == 4242
        introduce(defaultUser="nobody-knows-me")
        assert client.get("/files", params={"path": "x"}).json() == {
            "code": 401,
            "message": "invalid username: 'nobody-knows-me'",
        }


def test_parts_and_conditions_of_a_download(sdk: httpx.Client, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789" * 100_000)
    at = {"path": os.fspath(path), "username": ME}
    part = sdk.get("/files", params=at, headers={"range": "bytes=999990-"})
    assert (part.status_code, part.content) == (206, b"0123456789")
    assert part.headers["content-range"] == "bytes 999990-999999/1000000"
    assert sdk.get("/files", params=at, headers={"range": "bytes=1000000-"}).status_code == 416
    head = sdk.head("/files", params=at, headers={"accept-encoding": "identity"})
    assert (head.status_code, head.headers["content-length"]) == (200, "1000000")
    known = {"if-none-match": head.headers["etag"]}
    assert sdk.get("/files", params=at, headers=known).status_code == 304
    packed = sdk.get("/files", params=at, headers={"accept-encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.content == path.read_bytes()
    assert packed.num_bytes_downloaded < 100_000
    assert sdk.head("/files", params=at | {"path": f"{path}-none"}).status_code == 404
    assert sdk.get("/files", params=at | {"path": os.fspath(tmp_path)}).status_code == 400


def test_a_form_of_files_with_metadata(sdk: httpx.Client, tmp_path: Path) -> None:
    paths = [f"{tmp_path}/a/ü.txt", f"{tmp_path}/b.txt"]
    form = [("file", (path, path.encode())) for path in paths]
    headers = {"X-Metadata-Author": "ann"}
    told = sdk.post("/files", params={"username": ME}, files=form, headers=headers).json()
    if "keeps none" in str(told):
        pytest.skip("this file system has no attributes")
    kept = {"author": "ann"}
    assert told == [
        {"path": path, "name": Path(path).name, "type": "file", "metadata": kept} for path in paths
    ]
    assert [Path(path).read_text() for path in paths] == paths

    def call(method: str, **message: Any) -> Any:
        return sdk.post(f"/filesystem.Filesystem/{method}", json=message).json()

    assert call("Stat", path=paths[1])["entry"]["metadata"] == kept
    assert os.getxattr(paths[0], "user.e2b.author") == b"ann"
    assert call("ListDir", path=f"{tmp_path}/a")["entries"][0]["metadata"] == kept
    moved = call("Move", source=paths[1], destination=f"{tmp_path}/c.txt")
    assert moved["entry"]["metadata"] == kept
    whole = {"source_paths": [paths[0], f"{tmp_path}/c.txt"], "destination": f"{tmp_path}/whole"}
    made = sdk.post("/files/compose", json=whole | {"username": ME})
    assert made.json() == {"path": f"{tmp_path}/whole", "name": "whole", "type": "file"}
    assert Path(f"{tmp_path}/whole").read_text() == "".join(paths)
    assert not Path(f"{tmp_path}/c.txt").exists()
