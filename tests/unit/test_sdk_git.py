"""Credentials of git, against a server that asks for them, and what git says of a repository."""

from __future__ import annotations

import base64
import functools
import subprocess
import threading
from collections.abc import AsyncGenerator, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from sandmartin import AsyncSandbox, CommandFailed, Credentials, GitFile
from sandmartin.client.git import parse_status, split_credentials
from sandmartin.errors import Invalid
from tests.fakes_localagent import LocalAgent, serving

NAME, PASSWORD = "me@example.org", "päss word'%\"$(x)"


class Handler(SimpleHTTPRequestHandler):
    """Files for whoever says the right name and password."""

    def do_GET(self) -> None:
        right = base64.b64encode(f"{NAME}:{PASSWORD}".encode()).decode()
        if self.headers.get("authorization") == f"Basic {right}":
            super().do_GET()
            return
        self.send_response(401)
        self.send_header("www-authenticate", 'Basic realm="git"')
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def git(*words: str, cwd: Path) -> None:
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *who, *words], cwd=cwd, check=True, capture_output=True, timeout=30)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The host and port of a server with a repository `bare`."""
    site = tmp_path / "site"
    (site / "bare").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    git("init", "--bare", "-b", "main", cwd=site / "bare")
    git("init", "-b", "main", cwd=tmp_path / "work")
    git("commit", "--allow-empty", "-m", "One", cwd=tmp_path / "work")
    git("push", str(site / "bare"), "main", cwd=tmp_path / "work")
    git("update-server-info", cwd=site / "bare")
    handler = functools.partial(Handler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncGenerator[AsyncSandbox, None]:
    (tmp_path / "root").mkdir()
    agent, url = LocalAgent(tmp_path / "root"), f"unix:{tmp_path}/s"
    async with serving(agent, tmp_path / "s"), await AsyncSandbox.create(url=url) as sandbox:
        yield sandbox


@pytest.mark.parametrize("how", ["argument", "url"])
async def test_credentials_are_used_and_kept_nowhere(
    sandbox: AsyncSandbox, server: str, tmp_path: Path, how: str
) -> None:
    clone = tmp_path / "clone"
    if how == "argument":
        credentials = Credentials(NAME, PASSWORD)
        await sandbox.git.clone(f"http://{server}/bare", str(clone), credentials=credentials)
    else:
        who = f"{quote(NAME, safe='')}:{quote(PASSWORD, safe='')}"
        await sandbox.git.clone(f"http://{who}@{server}/bare", str(clone))
    assert f"url = http://{server}/bare\n" in (clone / ".git" / "config").read_text()
    for file in clone.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert PASSWORD.encode() not in content and NAME.encode() not in content
    await sandbox.git.pull(str(clone), credentials=Credentials(NAME, PASSWORD))
    with pytest.raises(CommandFailed) as refused:
        await sandbox.git.pull(str(clone), credentials=Credentials(NAME, "another"))
    assert "another" not in str(refused.value)
    with pytest.raises(CommandFailed, match="could not read Username"):
        await sandbox.git.pull(str(clone))
    assert PASSWORD not in repr(Credentials(NAME, PASSWORD))


@pytest.mark.parametrize("password", ["a\nusername=x", "a\0"])
async def test_credentials_that_would_say_more_are_refused(
    sandbox: AsyncSandbox, password: str
) -> None:
    with pytest.raises(Invalid):
        await sandbox.git.clone("http://x/y", "/z", credentials=Credentials("a", password))


def test_urls() -> None:
    assert split_credentials("https://h/r.git") == ("https://h/r.git", None)
    assert split_credentials("git@h:r.git") == ("git@h:r.git", None)
    url, found = split_credentials("https://a%40b:c%2F@h:1/r?x")
    assert (url, found) == ("https://h:1/r?x", Credentials("a@b", "c/"))


def test_what_git_says() -> None:
    said = "\0".join(
        [
            "# branch.oid 0123",
            "# branch.head main",
            "# branch.upstream origin/main",
            "# branch.ab +2 -1",
            "1 .M N... 100644 100644 100644 1 1 a b",
            "2 R. N... 100644 100644 100644 1 1 R100 new name",
            "old name",
            "u UU N... 100644 100644 100644 100644 1 2 3 both",
            "? new",
            "",
        ]
    )
    status = parse_status(said)
    assert (status.branch, status.upstream, status.ahead, status.behind) == (
        "main",
        "origin/main",
        2,
        1,
    )
    assert status.files == (
        GitFile(path="a b", index=".", worktree="M"),
        GitFile(path="new name", index="R", worktree=".", renamed_from="old name"),
        GitFile(path="both", index="U", worktree="U"),
        GitFile(path="new", index="?", worktree="?"),
    )
    detached = parse_status("# branch.oid 1\0# branch.head (detached)\0")
    assert (detached.branch, detached.is_clean) == ("", True)
