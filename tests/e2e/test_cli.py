"""Every verb against `sandmartin up` with a real VM, as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from tests.e2e.conftest import Place
from tests.e2e.test_up import Up, clear, up
from tests.terminal import Terminal, ended

_DEADLINE_S = 60.0


@dataclass(frozen=True)
class Verbs:
    """The command, for the control plane of `up`."""

    place: Place
    up: Up

    @property
    def environment(self) -> dict[str, str]:
        return self.place.environment | {
            "SANDMARTIN_URL": self.up.url,
            "SANDMARTIN_API_KEY": self.up.key,
        }

    def run(
        self, *words: str, stdin: bytes = b"", code: int = 0
    ) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "sandmartin", *words],
            input=stdin,
            capture_output=True,
            env=self.environment,
            timeout=_DEADLINE_S,
            check=False,
        )
        assert done.returncode == code, (words, done.stderr, self.up.log.read_text()[-2000:])
        return done

    def __call__(self, *words: str, stdin: bytes = b"") -> str:
        return self.run(*words, stdin=stdin).stdout.decode()

    def json(self, *words: str, code: int = 0) -> Any:
        return json.loads(self.run(*words, "--json", code=code).stdout)

    def sh(self, sandbox_id: str, script: str) -> str:
        return self("exec", sandbox_id, "--", "sh", "-c", script)


async def test_every_verb(place: Place) -> None:
    with up(place, "data") as served:
        verbs = Verbs(place, served)
        first = verbs("create", "--memory", "256", "-e", "A=b", "--timeout", "900").strip()
        inside(verbs, first)
        files(verbs, first)
        await shell(verbs, first)
        logs(verbs, first)
        history(verbs, first)
        answer = verbs("run", "--memory", "256", "--", "tr", "a-z", "A-Z", stdin=b"hi\n")
        assert answer == "HI\n"
        assert verbs("kill", first) == f"{first}\n"
        assert verbs("template", "rm", "mine") == "mine\n"
        assert verbs.json("ls") == []
        assert verbs.json("info", first)["state"] == "stopped"
    clear(place, "data")


def inside(verbs: Verbs, first: str) -> None:
    """`info`, `ls`, `exec`, `ps`, `metrics`, `url`."""
    info = verbs.json("info", first)
    assert (info["state"], info["memory_mb"], info["timeout_s"]) == ("running", 256, 900)
    assert [each["sandbox_id"] for each in verbs.json("ls")] == [first]
    assert verbs.sh(first, "echo $A $(id -un)") == "b root\n"
    data = os.urandom(3 << 20)
    done = verbs.run(
        "exec", first, "--", "sh", "-c", "cat; echo over >&2; exit 7", stdin=data, code=7
    )
    assert (done.stdout, done.stderr) == (data, b"over\n")
    assert b"not found" in verbs.run("exec", first, "--", "no-such", code=126).stderr
    assert (
        b"time" in verbs.run("exec", "--timeout", "1", first, "--", "sleep", "99", code=137).stderr
    )
    verbs.sh(first, "nohup sleep 999 >/dev/null 2>&1 &")
    assert verbs.json("ps", first) == []
    verbs.sh(first, "echo kept >/dev/shm/memory")
    port = served_port(verbs)
    assert verbs("url", first, "3000") == f"http://3000-{first}.localhost:{port}\n"
    until = time.monotonic() + _DEADLINE_S
    while not (points := verbs.json("metrics", first)) and time.monotonic() < until:
        time.sleep(0.2)
    assert points[-1]["mem_bytes"] > 0 and points[-1]["disk_bytes"] > 0


def served_port(verbs: Verbs) -> str:
    return verbs.up.url.rpartition(":")[2]


def files(verbs: Verbs, first: str) -> None:
    """`cp`, both ways."""
    tree = verbs.place.path / "tree"
    (tree / "deep" / "empty").mkdir(parents=True)
    (tree / "deep" / "big.bin").write_bytes(os.urandom(9 << 20))
    (tree / "run").write_text("#!/bin/sh\necho ran\n")
    assert verbs.json("cp", "-r", str(tree), f"{first}:/srv/tree")["files"] == 2
    assert verbs.sh(first, "sh /srv/tree/run; ls /srv/tree/deep") == "ran\nbig.bin\nempty\n"
    back = verbs.place.path / "back"
    verbs("cp", "-r", f"{first}:/srv/tree", str(back))
    assert (back / "deep" / "big.bin").read_bytes() == (tree / "deep" / "big.bin").read_bytes()
    verbs("cp", str(tree / "run"), f"{first}:/srv/")
    verbs("cp", f"{first}:/srv/run", str(verbs.place.path / "single"))
    assert (verbs.place.path / "single").read_bytes() == (tree / "run").read_bytes()
    said = verbs.run("cp", f"{first}:/srv/nothing", "x", code=1).stderr
    assert said.startswith(b"sandmartin: ")


async def shell(verbs: Verbs, first: str) -> None:
    """`shell` on a real terminal, which is resized."""
    terminal = Terminal(**verbs.environment | {"PS1": "$ "})
    try:
        child = await terminal.start("shell", first)
        terminal.type("echo $((6*7))-shell; stty size\n")
        await terminal.shows("42-shell")
        await terminal.shows("40 100")
        terminal.resize(120, 30)
        terminal.type(
            "while [ \"$(stty size)\" != '30 120' ]; do sleep 0.02; done; echo re''sized\n"
        )
        await terminal.shows("resized")
        terminal.type("echo go''ing; sleep 1000\n")
        await terminal.shows("going")
        terminal.type("\x03")
        terminal.type("exit 7\n")
        assert await ended(child) == 7 and terminal.is_as_before
    finally:
        terminal.close()


def logs(verbs: Verbs, first: str) -> None:
    """`logs -f`, until the sandbox sleeps, and `pause` and `resume` with it."""
    following = subprocess.Popen(
        [sys.executable, "-P", "-m", "sandmartin", "logs", "-f", first],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=verbs.environment,
    )
    try:
        verbs.sh(first, "echo a word on the console >/dev/console")
        assert following.stdout is not None
        assert any(b"a word on the console" in line for line in following.stdout)
        assert verbs("pause", first) == f"{first}\n"
        _, said = following.communicate(timeout=_DEADLINE_S)
        assert following.returncode == 0 and said.startswith(b"the end: ")
    finally:
        following.kill()
        following.wait()
    assert b"is paused" in verbs.run("exec", first, "--", "true", code=125).stderr
    assert verbs("resume", first) == f"{first}\n"
    assert (
        verbs.sh(first, "cat /dev/shm/memory; pgrep -x sleep >/dev/null && echo on") == "kept\non\n"
    )


def history(verbs: Verbs, first: str) -> None:
    """`fork`, `checkpoint`, `checkpoints`, `rollback`, `snapshot`, `template`."""
    children = verbs("fork", first, "-n", "2").split()
    assert len(set(children)) == 2
    for each in children:
        assert verbs.sh(each, "cat /dev/shm/memory") == "kept\n"
    assert verbs("kill", *children).split() == children
    kept = verbs("checkpoint", first, "--comment", "before").strip()
    verbs.sh(first, "echo lost >/dev/shm/memory; rm -r /srv/tree")
    assert [each["comment"] for each in verbs.json("checkpoints", first)] == ["before"]
    assert verbs("rollback", first, kept) == f"{first}\n"
    assert verbs.sh(first, "cat /dev/shm/memory; ls /srv/tree") == "kept\ndeep\nrun\n"
    assert verbs.json("checkpoints", first, "--rm", kept) == []
    assert verbs("snapshot", first, "mine", "--live") == "mine\n"
    assert {"base", "mine"} <= {each["name"] for each in verbs.json("template", "ls")}
    second = verbs("create", "-t", "mine").strip()
    assert verbs.sh(second, "cat /dev/shm/memory") == "kept\n"
    assert verbs("kill", second).split() == [second]
    # The source goes on from its layers.
    assert verbs.json("template", "rm", "mine", code=1) == {"removed": [], "failed": ["mine"]}
