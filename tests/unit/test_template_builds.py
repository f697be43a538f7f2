"""Building templates by the SDK and the command line, over the real bodies and connections."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import signal
import sys
import tarfile
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sandmartin import AsyncTemplates, BuildFailed, BuildLog, Template, Templates
from sandmartin.cli.build_log import excerpt
from sandmartin.client.template import is_dockerfile
from sandmartin.errors import Invalid, NotFound, Unimplemented
from tests.command_line import finish
from tests.fakes_builds import KEY, BuildServer, serving_builds
from tests.terminal import Terminal, ended
from tests.waiting import until


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[BuildServer]:
    async with serving_builds() as server:
        monkeypatch.setenv("SANDMARTIN_URL", server.url)
        monkeypatch.setenv("SANDMARTIN_API_KEY", KEY)
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
        yield server


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A directory to build of."""
    made = tmp_path / "app"
    made.mkdir()
    (made / "Dockerfile").write_text("FROM docker.io/library/debian:12\nCOPY a /a\nRUN true\n")
    (made / "a").write_text("content")
    (made / "secret.txt").write_text("hush")
    (made / ".dockerignore").write_text("secret.txt\n")
    return made


def names_in(upload: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(upload))) as tar:
        return tar.getnames()


async def command(*words: str, cwd: Path | None = None) -> asyncio.subprocess.Process:
    argv = [sys.executable, "-m", "sandmartin", "template", *words]
    return await asyncio.create_subprocess_exec(
        *argv, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, cwd=cwd
    )


async def says(*words: str) -> tuple[int | None, str, str]:
    code, out, err = await finish(await command(*words))
    return code, out.decode(), err.decode()


# The template as a value.


def test_each_step_gives_another_template() -> None:
    ground = Template.from_template("base:v1", context="app")
    one = ground.run(["echo", "a b"]).copy(["x", Path("y")], "/srv/", user="user", mode=0o750)
    two = (
        one.env({"A": "1", "B": "2"})
        .workdir("/srv")
        .user("dev", create=True)
        .run("id", user="root")
    )
    done = two.no_cache().start("serve", ready="check").ready("check more")
    assert ground == Template.from_template("base:v1", context="app") != one
    steps = done._steps
    assert [(each.type, *each.args) for each in steps.steps] == [
        ("RUN", "echo 'a b'"),
        ("COPY", "x", "/srv/", "user", "0750"),
        ("COPY", "y", "/srv/", "user", "0750"),
        ("ENV", "A", "1", "B", "2"),
        ("WORKDIR", "/srv"),
        ("USER", "dev", "true"),
        ("RUN", "id", "root"),
    ]
    assert [each.force for each in steps.steps] == [False] * 6 + [True]
    assert (steps.start_cmd, steps.ready_cmd) == ("serve", "check more")
    assert not any(each.force for each in two._steps.steps)


def test_a_file_is_all_of_its_template(app: Path) -> None:
    written = Template.from_dockerfile(app / "Dockerfile", username="u", password="hush")
    with pytest.raises(Invalid, match="Dockerfile is all of this template"):
        written.run("true")
    assert "hush" not in repr(written)
    with pytest.raises(Invalid, match="none cannot be read: No such file"):
        Template.from_dockerfile(app / "none")
    with pytest.raises(Invalid, match="no step yet"):
        Template.from_template().no_cache()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# syntax=x\n\nFROM a\n", True),
        ("arg A=1\nFROM a", True),
        ("# a recipe\nRUN psql -c 'SELECT * \\\nFROM t'\n", False),
        ("", False),
    ],
)
def test_a_dockerfile_is_known_by_its_first_instruction(text: str, expected: bool) -> None:
    assert is_dockerfile(text) is expected


# The SDK.


async def test_a_build_of_steps_sends_its_files_once(server: BuildServer, app: Path) -> None:
    template = Template.from_template(context=app).copy("a", "/a").run("true").copy("a", "/b")
    heard: list[BuildLog] = []
    templates = AsyncTemplates()
    for number in (1, 2):
        building = asyncio.create_task(
            templates.build(template, name="app:v1", tags=["v2"], vcpus=2, on_log=heard.append)
        )
        build = await server.begun(number)
        build.say("hello", step=1, elapsed_ms=20)
        build.end()
        made = await building
    assert (made.state, made.template_id, made.steps_total) == ("ready", "t1", 3)
    assert [(each.message, each.step, each.elapsed_ms) for each in heard] == [
        ("hello", "1", 20)
    ] * 2
    ((sha256, upload),) = server.uploads.items()
    assert names_in(upload) == [".dockerignore", "Dockerfile", "a"]
    copied = {"type": "COPY", "files_hash": sha256}
    assert build.asked == {
        "name": "app:v1",
        "tags": ["v2"],
        "vcpus": 2,
        "source": {
            "kind": "steps",
            "from_template": "base",
            "steps": [
                {**copied, "args": ["a", "/a", "", ""]},
                {"type": "RUN", "args": ["true"]},
                {**copied, "args": ["a", "/b", "", ""]},
            ],
            "start_cmd": "",
            "ready_cmd": "",
        },
    }
    assert [each.build_id for each in await templates.builds()] == ["b2", "b1"]
    assert [each.message async for each in templates.build_log("b1")] == ["hello"]


async def test_who_waits_hears_the_log_of_a_dockerfile(server: BuildServer, app: Path) -> None:
    template = Template.from_dockerfile(app / "Dockerfile", username="u", password="p")
    heard: list[str] = []

    def build() -> str:
        made = Templates().build(
            template,
            name="app",
            arguments={"A": "1"},
            secrets={"s": "hush"},
            no_cache=True,
            on_log=lambda entry: heard.append(entry.message),
        )
        return made.state

    building = asyncio.create_task(asyncio.to_thread(build))
    begun = await server.begun()
    begun.say("one")
    await until(lambda: heard == ["one"], "the first line")
    begun.end()
    assert await building == "ready"
    (sha256,) = server.uploads
    assert begun.asked == {
        "name": "app",
        "source": {
            "kind": "dockerfile",
            "text": (app / "Dockerfile").read_text(),
            "file": "Dockerfile",
        },
        "context": sha256,
        "registry": {"username": "u", "password": "p"},
        "arguments": {"A": "1"},
        "secrets": {"s": "hush"},
        "no_cache": True,
    }


async def test_what_copies_nothing_sends_nothing(server: BuildServer, app: Path) -> None:
    (app / "recipe").write_text("RUN true\n")
    template = Template.from_recipe(app / "recipe")
    building = asyncio.create_task(AsyncTemplates().build(template, name="app"))
    begun = await server.begun()
    begun.end()
    await building
    assert not server.uploads
    assert begun.asked["from_template"] == "base"
    assert "context" not in begun.asked


async def test_an_archive_is_sent_as_it_is(server: BuildServer, tmp_path: Path) -> None:
    (tmp_path / "image.tar").write_bytes(b"an image" * 200_000)
    template = Template.from_archive(tmp_path / "image.tar")
    building = asyncio.create_task(AsyncTemplates().build(template, name="app"))
    begun = await server.begun()
    begun.end()
    await building
    sha256 = hashlib.sha256(b"an image" * 200_000).hexdigest()
    assert begun.asked["from_archive"] == sha256
    assert list(server.uploads) == [sha256]


async def test_a_build_whose_answer_is_lost_is_asked_for_again(server: BuildServer) -> None:
    server.lost_answers = 2
    building = asyncio.create_task(AsyncTemplates().build(Template.from_template(), name="app"))
    begun = await server.begun()
    begun.end()
    assert (await building).build_id == begun.build_id
    assert (len(server.builds), server.lost_answers) == (1, 0)


async def test_a_log_is_followed_across_lost_connections(server: BuildServer) -> None:
    server.cut_after = 2
    heard: list[int] = []
    building = asyncio.create_task(
        AsyncTemplates().build(
            Template.from_template(), name="app", on_log=lambda entry: heard.append(entry.number)
        )
    )
    begun = await server.begun()
    for number in range(5):
        begun.say(str(number))
    await until(lambda: heard == [1, 2, 3, 4, 5], "all lines")
    begun.end()
    await building
    assert heard == [1, 2, 3, 4, 5]
    assert server.streams >= 3


async def test_a_failure_says_what_failed(server: BuildServer) -> None:
    building = asyncio.create_task(AsyncTemplates().build(Template.from_template(), name="app"))
    (await server.begun()).end("failed", message="'false' ended with 1", hint="mend it", step=2)
    with pytest.raises(BuildFailed, match="'false' ended with 1") as failed:
        await building
    assert (failed.value.step, failed.value.hint, failed.value.build.state) == (
        "2",
        "mend it",
        "failed",
    )


async def test_who_gives_up_cancels_the_build(server: BuildServer) -> None:
    building = asyncio.create_task(AsyncTemplates().build(Template.from_template(), name="app"))
    begun = await server.begun()
    await until(lambda: server.streams > 0, "somebody who listens")
    building.cancel()
    with pytest.raises(asyncio.CancelledError):
        await building
    assert begun.state == "cancelled"


async def test_tags_come_and_go(server: BuildServer) -> None:
    templates = AsyncTemplates()
    await templates.tag("app:v1", "stable", "v2")
    assert [(each.tag, each.template_id) for each in await templates.tags("app")] == [
        ("stable", "t1"),
        ("v2", "t1"),
    ]
    await templates.untag("app", "v2")
    with pytest.raises(NotFound):
        await templates.untag("app", "v2")
    with pytest.raises(Invalid, match="tag '-2' is not valid"):
        await templates.tag("app", "-2")


async def test_an_agent_alone_builds_nothing(tmp_path: Path) -> None:
    templates = AsyncTemplates(url=f"unix:{tmp_path}/agent.sock")
    with pytest.raises(Unimplemented, match="a build needs a control plane"):
        await templates.build(Template.from_template(), name="app")


# The command line.


async def test_the_command_builds_a_dockerfile(
    server: BuildServer, app: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", "hush")
    (app / "key").write_text("deep")
    flags = ["--build-arg", "A=b=c", "--secret", "id=t,env=TOKEN"]
    flags += ["--secret", f"id=k,src={app / 'key'}", "--memory", "256", "--vcpus", "2"]
    line = await command("build", str(app), "--tag", "v1", "--disk", "6000", *flags)
    begun = await server.begun()
    begun.say("RUN true", step=2)
    begun.say("some\x1b[31m output", step=2, level="debug")
    begun.say("done", step=2, elapsed_ms=1500)
    begun.end()
    code, out, err = await finish(line)
    assert (code, out) == (0, b"app\n"), err
    assert err.decode().splitlines() == [
        "build b1 of app",
        "   0.0 s  [2/3] RUN true",
        "   0.0 s  [2/3] some\N{REPLACEMENT CHARACTER}[31m output",
        "   1.5 s  [2/3] done",
        "ready after 3.5 s: 3 steps, 1 of them cached",
    ]
    asked = begun.asked
    assert (asked["name"], asked["tags"], asked["arguments"]) == ("app", ["v1"], {"A": "b=c"})
    assert asked["secrets"] == {"t": "hush", "k": "deep"}
    assert (asked["vcpus"], asked["memory_mb"], asked["disk_size_mb"]) == (2, 256, 6000)
    assert server.uploads[asked["context"]]


async def test_a_recipe_and_an_image_are_built_by_from(server: BuildServer, app: Path) -> None:
    (app / "Dockerfile").write_text("RUN true\n")
    for number, (words, expected) in enumerate(
        [
            ((str(app),), {"kind": "recipe", "template": "base"}),
            (
                ("--from", "mine:v1", "-f", str(app / "Dockerfile"), str(app)),
                {"template": "mine:v1"},
            ),
            (("--from", "python:v3", "--name", "x"), {"kind": "steps", "template": "python:v3"}),
            (
                ("--from", "docker.io/library/alpine:3", "--name", "x"),
                {"image": "docker.io/library/alpine:3"},
            ),
        ],
        1,
    ):
        line = await command("build", *words, "--json")
        begun = await server.begun(number)
        begun.end()
        code, out, err = await finish(line)
        assert code == 0, err
        assert json.loads(out)["state"] == "ready"
        source = begun.asked["source"]
        found = {
            "kind": source["kind"],
            "template": begun.asked.get("from_template") or source.get("from_template"),
            "image": begun.asked.get("from_image") or source.get("from_image"),
        }
        assert expected.items() <= found.items()


async def test_a_refusal_shows_the_line(server: BuildServer, app: Path) -> None:
    (app / "Dockerfile").write_text("FROM a\nRUN true\nCOPY --parents\ta b\n")
    server.refusal = {"message": "Dockerfile:3:6: '--parents' is no flag", "hint": "leave it out"}
    assert await says("build", str(app)) == (
        1,
        "",
        "3 | COPY --parents a b\n"
        "  |      ^\n"
        "sandmartin: Dockerfile:3:6: '--parents' is no flag\n"
        "hint: leave it out\n",
    )


async def test_a_failed_step_ends_the_command_with_1(server: BuildServer, app: Path) -> None:
    line = await command("build", str(app))
    (await server.begun()).end("failed", message="Dockerfile:3:1: RUN ended with 7", step=2)
    code, out, err = await finish(line)
    assert (code, out) == (1, b"")
    assert err.decode().splitlines()[1:] == [
        "3 | RUN true",
        "  | ^",
        "sandmartin: Dockerfile:3:1: RUN ended with 7",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_cancels_the_build(server: BuildServer, app: Path, number: int) -> None:
    line = await command("build", str(app))
    begun = await server.begun()
    await until(lambda: server.streams > 0, "somebody who listens")
    line.send_signal(number)
    code, out, _ = await finish(line)
    assert (code, out, begun.state) == (128 + number, b"", "cancelled")


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--secret", "id=x"), 1, "--secret 'id=x' is not valid"),
        (("--secret", "id=x,env=NO_SUCH"), 1, "of NO_SUCH, which is not set"),
        (("--secret", "id=x,src=/no/such"), 1, "/no/such cannot be read"),
        (("--build-arg", "=x"), 1, "--build-arg '=x' is not valid"),
        (("--name", "No"), 1, "template name 'No' is not valid"),
        (("--tag", "a/b"), 1, "tag 'a/b' is not valid"),
        (("-f", "/no/such"), 1, "/no/such cannot be read"),
        (("--from", "base"), 0, ""),
        (("--registry-user", "u"), 1, "there is no password for u"),
        (("--oci-archive", "x", "--from", "base"), 2, "--oci-archive is built as it is"),
        (("--from", "base", "-f", "Dockerfile"), 2, "is a Dockerfile, whose FROM says"),
    ],
)
async def test_wrong_words_are_refused(
    server: BuildServer, app: Path, words: tuple[str, ...], code: int, told: str
) -> None:
    line = await command("build", *words, cwd=app)
    if not code:
        (await server.begun()).end()
    found, _, err = await finish(line)
    assert (found, told in err.decode()) == (code, True), err
    assert bool(server.builds) is not bool(code)


async def test_a_terminal_shows_colours(server: BuildServer, app: Path) -> None:
    terminal = Terminal(TERM="xterm")
    line = await terminal.start("template", "build", str(app))
    begun = await server.begun()
    begun.say("RUN true (cached)", step=1)
    begun.end("failed", message="it broke")
    await terminal.shows("\x1b[36m[1/3] \x1b[0m\x1b[32mRUN true (cached)\x1b[0m")
    assert await ended(line) == 1


async def test_what_became_of_builds_is_told(server: BuildServer, app: Path) -> None:
    assert await says("builds", "--json") == (0, "[]\n", "")
    line = await command("build", str(app), "--json")
    begun = await server.begun()
    for number in range(5):
        begun.say(f"line {number}")
    begun.end()
    assert (await finish(line))[0] == 0
    code, out, _ = await says("builds")
    assert (code, out.splitlines()[1].split()[:4]) == (0, ["b1", "app", "ready", "3/3"])
    code, out, _ = await says("logs", "b1")
    assert (code, out.splitlines()) == (0, [f"   0.0 s  line {number}" for number in range(5)])
    code, out, _ = await says("logs", "-f", "b1", "--json")
    assert [json.loads(each)["number"] for each in out.splitlines()] == [1, 2, 3, 4, 5]
    assert await says("cancel", "b1", "--json") == (0, '{"cancelled": ["b1"], "failed": []}\n', "")
    code, _, err = await says("logs", "b9")
    assert (code, err) == (1, "sandmartin: there is no such build\n")


async def test_tags_by_the_command(server: BuildServer) -> None:
    assert (await says("tag", "app:v1", "v2", "stable"))[:2] == (0, "")
    _, out, _ = await says("tag", "app")
    assert [each.split()[:2] for each in out.splitlines()[1:]] == [["stable", "t1"], ["v2", "t1"]]
    assert (await says("tag", "app", "v2", "--rm"))[:2] == (0, "")
    _, out, _ = await says("tag", "app", "--json")
    assert [each["tag"] for each in json.loads(out)] == ["stable"]
    assert (await says("tag", "app", "--rm"))[0] == 2


def test_a_long_line_is_cut_around_its_place(app: Path) -> None:
    (app / "Dockerfile").write_text("RUN " + "x" * 1000 + "\N{BELL}!" + "y" * 1000 + "\n")
    template = Template.from_dockerfile(app / "Dockerfile")
    shown, caret = excerpt(template, "Dockerfile:1:1006: no")
    assert shown[caret.index("^")] == "!"
    assert len(shown) < 250
    assert excerpt(template, "Dockerfile:9:1: no") == excerpt(template, "other:1:1: no") == []
