"""Files of a sandbox: content of any size in bounded memory, and directories."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import sys
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.control.living import Place
from tests.waiting import until

pytestmark = pytest.mark.root

MIB = 1 << 20
BYTES = bytes(range(256)) * 4096 + b"odd"


async def ask(place: Place, what: str, **body: Any) -> httpx.Response:
    return await place.http.post(f"{place.path}/files/{what}", json=body)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def assert_kept(answer: httpx.Response, name: str) -> None:
    """A browser keeps the answer under a name; at our origin nothing of it is shown or run."""
    assert answer.headers["content-disposition"] == f"attachment; filename*=UTF-8''{name}"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in answer.headers["content-security-policy"].split("; ")
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"


async def test_what_goes_up_comes_down(place: Place, tmp_path: Path) -> None:
    at = str(tmp_path / "deep" / "ü.bin")
    put = await place.http.put(f"{place.path}/files", params={"path": at}, content=BYTES)
    assert put.status_code == 204, put.text
    for answer in (
        await place.http.get(f"{place.path}/files", params={"path": at}),
        await ask(place, "read", path=at),
        await ask(place, "stream/read", path=at),
    ):
        assert (answer.status_code, answer.content) == (200, BYTES)
        assert_kept(answer, "%C3%BC.bin")
    for route in ("write", "stream/write"):
        form = {"data": {"path": at}, "files": {"file": ("x", route.encode() * 99_999)}}
        written = await place.http.post(f"{place.path}/files/{route}", **form)  # type: ignore[arg-type]
        assert written.status_code == 204, written.text
        assert Path(at).read_bytes() == route.encode() * 99_999


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("a.html", "a.html"),
        ('"; x=\r\nset-cookie: a=b', "%22%3B%20x%3D%0D%0Aset-cookie%3A%20a%3Db"),
        ("<b>\u202e'.exe", "%3Cb%3E%E2%80%AE%27.exe"),
    ],
    ids=["plain", "header", "turned"],
)
async def test_content_is_kept_and_never_shown(
    place: Place, tmp_path: Path, name: str, kept: str
) -> None:
    content = b"<script>alert(1)</script>"
    (tmp_path / name).write_bytes(content)
    params = {"path": str(tmp_path / name)}
    answer = await place.http.get(f"{place.path}/files", params=params)
    assert (answer.content, answer.headers["content-type"]) == (content, "application/octet-stream")
    assert "set-cookie" not in answer.headers
    assert_kept(answer, kept)
    tree = await place.http.get(f"{place.path}/files/tree", params=params)
    assert_kept(tree, f"{kept}.tar")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n--b--\r\n', "no path"),
        (b'--b\r\nContent-Disposition: form-data; name="path"\r\n\r\n/x\r\n--b--\r\n', "no file"),
        (b"--c\r\n\r\n", "malformed"),
        (
            b'--b\r\nContent-Disposition: form-data; name="path"\r\n\r\n' + b"x" * 20_000,
            "too long",
        ),
        (
            b'--b\r\nContent-Disposition: form-data; name="path"\r\n\r\n%s\r\n'
            b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nhalf of it',
            "before its last",
        ),
    ],
    ids=["no path", "no file", "other boundary", "long field", "cut"],
)
async def test_a_bad_form_writes_nothing(
    place: Place, tmp_path: Path, body: bytes, why: str
) -> None:
    path = tmp_path / "never"
    headers = {"content-type": "multipart/form-data; boundary=b"}
    body = body.replace(b"%s", os.fsencode(path))
    answer = await place.http.post(f"{place.path}/files/write", content=body, headers=headers)
    assert code(answer) == (400, "invalid")
    assert why in answer.json()["error"]["message"]
    # Whoever is told need not wait for the cleaning up.
    await until(lambda: not path.exists(), "the end of a broken file")


async def test_an_upload_that_breaks_off_leaves_nothing(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "half"
    reader, writer = await asyncio.open_connection("127.0.0.1", place.http.base_url.port)
    head = f"PUT {place.path}/files?path={path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {place.key}\r\n"
    writer.write(f"{head}Content-Length: 1000000\r\n\r\n".encode() + bytes(500_000))
    await writer.drain()
    writer.close()
    await reader.read()
    await until(lambda: not list(tmp_path.iterdir()), "the end of a broken file")


async def test_directories(place: Place, tmp_path: Path) -> None:
    top = str(tmp_path / "a")
    assert (await ask(place, "mkdir", path=f"{top}/b/c")).status_code == 204
    assert code(await ask(place, "mkdir", path=f"{top}/b")) == (409, "already_exists")
    Path(top, "file").write_bytes(b"12345")
    Path(top, "file").chmod(0o4750)
    Path(top, "link").symlink_to("file")
    listed = (await ask(place, "list", path=top)).json()["entries"]
    assert {each["name"]: each["type"] for each in listed} == {
        "b": "directory",
        "file": "file",
        "link": "file",
    }
    found = (await ask(place, "stat", path=f"{top}/file")).json()
    assert (found["size"], found["permissions"], found["owner"]) == (5, "-rwsr-x---", "root")
    deep = (await ask(place, "list", path=top, depth=2)).json()["entries"]
    assert f"{top}/b/c" in {each["path"] for each in deep}
    moved = await ask(place, "move", source=f"{top}/file", destination=f"{top}/b/moved")
    assert moved.status_code == 204
    assert (await ask(place, "remove", path=top)).status_code == 204
    assert (await ask(place, "remove", path=top)).status_code == 204
    for what in ("stat", "list", "read"):
        assert code(await ask(place, what, path=top)) == (404, "not_found"), what
    for path in ("", "/a/../b", "/nul\0"):
        assert code(await ask(place, "stat", path=path)) == (400, "invalid"), path
    denied = await ask(place, "read", path="/etc/shadow", user="nobody")
    assert code(denied) == (403, "denied")


_SERVE = """
import asyncio, sys
from pathlib import Path
from sandmartin.control.platform import open_platform
from sandmartin.control.server import listen, serving
from sandmartin.control.settings import ControlSettings

async def main():
    settings = ControlSettings(data_dir=Path(sys.argv[1]), database_url=sys.argv[2])
    listener = listen("127.0.0.1", 0)
    async with open_platform(settings) as platform, serving(platform, listener):
        print(listener.getsockname()[1], flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

asyncio.run(main())
"""


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


async def test_a_control_plane_of_bounded_memory_passes_300_mb(
    place: Place, tmp_path: Path
) -> None:
    """Up and down, and to a client that does not read."""
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-c", _SERVE),
        *(str(place.platform.settings.data_dir), place.platform.settings.url),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert server.stdin is not None and server.stdout is not None
    try:
        port = int(await server.stdout.readline())
        before = peak_bytes(server.pid)
        path = tmp_path / "large"
        digest, size = hashlib.sha256(), 0

        async def content() -> AsyncIterator[bytes]:
            for number in range(300):
                piece = bytes([number % 251]) * MIB
                if number < 64:
                    digest.update(piece)
                yield piece

        url = f"http://127.0.0.1:{port}{place.path}/files"
        query = {"path": str(path)}
        async with httpx.AsyncClient(
            headers=dict(place.http.headers), timeout=60, trust_env=False
        ) as http:
            written = await http.put(url, params=query, content=content())
            assert written.status_code == 204, written.text
            assert path.stat().st_size == 300 * MIB
            os.truncate(path, 64 * MIB)
            back = hashlib.sha256()
            async with http.stream("GET", url, params=query) as answer:
                async for piece in answer.aiter_bytes():
                    back.update(piece)
                    size += len(piece)
            assert (size, back.digest()) == (64 * MIB, digest.digest())
            async with http.stream("GET", url, params=query) as slow:
                await anext(slow.aiter_raw())
                whole = await http.get(url, params={"path": "/etc/passwd"})
                assert whole.content == Path("/etc/passwd").read_bytes()
        assert peak_bytes(server.pid) - before < 48 * MIB
    finally:
        server.stdin.close()
        await server.wait()


async def test_other_bodies_stay_small(place: Place) -> None:
    huge = b'{"cmd": "%s"}' % (b"x" * (2 * MIB))
    for kind in ("application/json", "text/plain"):
        headers = {"content-type": kind}
        answer = await place.http.post(f"{place.path}/exec", content=huge, headers=headers)
        assert answer.status_code == 413, kind


async def test_what_a_sandbox_tells_of_itself(place: Place) -> None:
    vm = next(iter(place.host.fakes.vmm.vms.values()))
    vm.console = b"[0.1] \xff<b>hello"
    console = await place.http.get(f"{place.path}/console")
    assert console.content == b"[0.1] \xff<b>hello"
    assert console.headers["content-type"].startswith("text/plain")
    metrics = f"{place.path}/metrics"

    def points(answer: httpx.Response) -> list[int]:
        assert answer.status_code == 200, answer.text
        return [each["timestamp"] for each in answer.json()["points"]]

    live: list[int] = []
    async with asyncio.timeout(20):
        while not live:
            await asyncio.sleep(0.05)
            live = points(await place.http.get(metrics, params={"range": "5m"}))
    assert (await place.http.post(f"{place.path}/pause")).status_code == 200
    for length in ("5m", "10m"):
        kept = points(await place.http.get(metrics, params={"range": length}))
        assert kept[: len(live)] == live and kept == sorted(kept)
    assert (await place.http.post(f"{place.path}/resume")).status_code == 200
    again = points(await place.http.get(metrics, params={"range": "10m"}))
    assert again[: len(kept)] == kept
    assert points(await place.http.get(metrics, params={"range": "24h"})) is not None
    wrong = await place.http.get(metrics, params={"range": "3m"})
    assert code(wrong) == (400, "invalid")


async def test_trees_go_up_and_come_down(place: Place, tmp_path: Path) -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, size in (("app/a", 3 * MIB + 1), ("app/b/c", 7)):
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.mtime = size, 0o755, 10**9
            tar.addfile(member, io.BytesIO(bytes(size)))
    at, url = str(tmp_path / "there"), f"{place.path}/files/tree"
    owned = {"path": at, "owner": "12:34"}
    put = await place.http.put(url, params=owned, content=made.getvalue())
    assert (put.status_code, put.json()) == (200, {"members": 2})
    status = Path(at, "app/a").stat()
    assert (status.st_uid, status.st_gid, status.st_mtime) == (12, 34, 10**9)
    got = await place.http.get(url, params={"path": f"{at}/app"})
    assert (got.status_code, got.headers["content-type"]) == (200, "application/x-tar")
    assert_kept(got, "app.tar")
    with tarfile.open(fileobj=io.BytesIO(got.content)) as tar:
        found = {each.name: each.size for each in tar}
    assert found == {"app": 0, "app/a": 3 * MIB + 1, "app/b": 0, "app/b/c": 7}


async def test_trees_that_are_refused_say_why(place: Place, tmp_path: Path) -> None:
    made, url = io.BytesIO(), f"{place.path}/files/tree"
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name in ("good", "../evil"):
            tar.addfile(tarfile.TarInfo(name))
    at = {"path": str(tmp_path / "there")}
    put = await place.http.put(url, params=at, content=made.getvalue())
    assert code(put) == (400, "invalid")
    assert "'../evil': its name leads up" in put.json()["error"]["message"]
    assert "(unpacked before: 1)" in put.json()["error"]["message"]
    for params in ({"path": "relative"}, {"path": "/a/../b"}, at | {"owner": "no-one-at-all"}):
        assert code(await place.http.put(url, params=params, content=b"")) == (400, "invalid")
    assert code(await place.http.get(url, params={"path": "relative"})) == (400, "invalid")
    assert code(await place.http.get(url, params={"path": "/no/such"})) == (404, "not_found")
    assert code(await place.http.get(url, params={"path": "/dev/null"})) == (400, "invalid")
