"""The command line as far as it goes without an agent: words, exit codes, talk, imports."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from sandmartin.cli import main, parse
from sandmartin.cli.background import background
from sandmartin.cli.run import Upload, plan_of
from sandmartin.cli.talk import print_table, say_error
from sandmartin.errors import Invalid, SandmartinError, Unavailable
from sandmartin.model import Accel


def test_the_command_line_alone_loads_no_part_of_the_agent() -> None:
    code = (
        "import sys, sandmartin.cli; sandmartin.cli.build_parser();"
        "heavy = {'connectrpc', 'pyroute2', 'qemu', 'uvicorn', 'protobuf', 'google'};"
        "print([m for m in sys.modules if m.partition('.')[0] in heavy"
        " or m.startswith(('sandmartin.agent', 'sandmartin.rpc'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Words.


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("run -- ls -l", ["ls", "-l"]),
        ("run ls -l --timeout", ["ls", "-l", "--timeout"]),
        ("run --memory 256 -- --debug -v", ["--debug", "-v"]),
        ("run sh -c x -- y -- z", ["sh", "-c", "x", "--", "y", "--", "z"]),
        ("run -- env -- x", ["env", "--", "x"]),
        ("run -e A=1 sh -e", ["sh", "-e"]),
        ("exec -u me sb1 -- ls -l", ["ls", "-l"]),
        ("exec sb1 ls -l -- x", ["ls", "-l", "--", "x"]),
    ],
)
def test_what_stands_behind_the_dashes_is_the_commands(words: str, command: list[str]) -> None:
    args = parse(words.split())
    assert args.command == command
    assert not args.debug


@pytest.mark.parametrize(
    "words",
    ["--debug run -- x", "run --debug -- x", "template ls --debug", "--debug template ls"],
)
def test_debug_stands_before_or_behind_the_verb(words: str) -> None:
    assert parse(words.split()).debug


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("", 2),
        ("frobnicate", 2),
        ("ls --frobnicate", 2),
        ("ls -- x", 2),
        ("kill", 2),
        ("info", 2),
        ("template", 2),
        ("template rm", 2),
        ("template ls -- x", 2),
        ("fork sb1 -n 0", 2),
        ("resume sb1 --timeout -1", 2),
        ("metrics sb1 --range 1y", 2),
        ("rollback sb1", 2),
        ("cp /a", 2),
        ("agent --accel warp", 2),
        ("run", 125),
        ("run --", 125),
        ("run --frobnicate -- x", 125),
        ("run --mem 512 -- x", 125),
        ("run --memory 0 -- x", 125),
        ("run --timeout soon -- x", 125),
        ("run -e -- x", 125),
        ("exec", 125),
        ("exec sb1", 125),
        ("exec sb1 -u me -- x", 125),
        ("exec --frobnicate sb1 -- x", 125),
        ("shell", 125),
        ("shell sb1 -- x", 125),
    ],
)
def test_wrong_usage_has_the_exit_code_of_its_verb(
    words: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == code
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("sandmartin: ")
    assert "\nhint: sandmartin" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("run -e =x -- x", "--env '=x'"),
        ("run -e NAME -- x", "--env 'NAME'"),
        ("run --file a -- x", "--file 'a'"),
        ("run --file :b -- x", "--file ':b'"),
        ("run --memory 1 -- x", "memory_mb is 1"),
        ("run --vcpus 65 -- x", "vcpus is 65"),
        ("run -t ../base -- x", "template name"),
        ("run --settings /nonexistent.toml -- x", "nonexistent.toml"),
        ("run -- x\udcff", "not UTF-8"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_begins(
    words: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split(" ")) == 125
    assert says in capsys.readouterr().err


def test_a_plan_holds_all_that_was_asked_for(tmp_path: Path) -> None:
    words = "run -t py --memory 256 --vcpus 2 --disk 6000 -e A=b=c -e E= --timeout 9 -u me --cwd /w"
    flags = ["--file", "a:b:/c", "--data-dir", os.fspath(tmp_path), "--accel", "tcg"]
    plan = plan_of(parse([*words.split(), *flags, "--", "sh", "-c", "x y"]))
    new, command = plan.new, plan.command
    assert (new.template, new.memory_mb, new.vcpus, new.disk_size_mb) == ("py", 256, 2, 6000)
    assert (command.cmd, command.args) == ("sh", ("-c", "x y"))
    assert (command.user, command.cwd, command.timeout_s) == ("me", "/w", 9)
    # Given to the command, not to the sandbox: it is in no journal.
    assert command.envs == {"A": "b=c", "E": ""}
    assert not new.envs
    assert plan.uploads == (Upload(local="a:b", remote="/c"),)
    assert plan.place.socket == tmp_path / "agent.sock"
    assert plan.agent_argv[-2:] == ("--accel", Accel.TCG)
    assert "b=c" not in " ".join(plan.agent_argv)


@pytest.mark.parametrize("what", ["missing", "directory"])
def test_an_upload_must_be_a_file(tmp_path: Path, what: str) -> None:
    path = tmp_path if what == "directory" else tmp_path / "missing"
    with pytest.raises(Invalid, match=path.name):
        Upload(local=os.fspath(path), remote="/x").open()


def test_help_of_every_verb_prints(capsys: pytest.CaptureFixture[str]) -> None:
    lists = "create ls ps info exec shell cp pause resume fork checkpoint rollback snapshot kill"
    others = (
        "run checkpoints logs metrics url template agent setup doctor login logout key completion"
    )
    for verb in (*lists.split(), *others.split(), "template ls", "template rm", "key create"):
        with pytest.raises(SystemExit) as ended:
            main([*verb.split(), "--help"])
        assert ended.value.code == 0
        assert f"sandmartin {verb}" in capsys.readouterr().out


# Exit codes and talk.


@pytest.mark.parametrize(("words", "code"), [("ls", 1), ("run -- x", 125), ("exec sb1 -- x", 125)])
def test_a_bug_shows_its_traceback_and_is_no_exit_code_of_a_command(
    words: str, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(work: Coroutine[Any, Any, object]) -> None:
        work.close()
        raise ZeroDivisionError

    monkeypatch.setattr(asyncio, "run", broken)
    assert main(words.split()) == code
    assert "Traceback" in capsys.readouterr().err


def test_without_an_agent_the_error_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kill", "sb1", "--json", "--data-dir", os.fspath(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == '{"killed": [], "failed": ["sb1"]}\n'
    assert err == (
        f"sandmartin: no agent listens on {tmp_path}/agent.sock\n"
        "hint: start one: sudo sandmartin agent\n"
    )


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["info", "../x"], 1, "sandbox id '../x' is not valid"),
        (["pause", "sb1", "."], 1, "sandbox id '.' is not valid"),
        (["snapshot", "sb1", "a/b"], 1, "template name 'a/b' is not valid"),
        (["rollback", "sb1", ".."], 1, "checkpoint id '..' is not valid"),
        (["template", "rm", "/"], 1, "template name '/' is not valid"),
        (["create", "--memory", "1"], 1, "memory_mb is 1"),
        (["create", "-e", "A"], 1, "--env 'A'"),
        (["create", "-e", "A=\udcff"], 1, "not UTF-8"),
        (["checkpoint", "sb1", "--comment", "\udcff"], 1, "not UTF-8"),
        (["cp", "a", "b"], 1, "one of source and destination must be in a sandbox"),
        (["cp", "sb1:/a", "sb2:/b"], 1, "one of source and destination must be in a sandbox"),
        (["cp", "sb1:", "b"], 1, "names no path in the sandbox"),
        (["cp", "sb 1:/a", "b"], 1, "sandbox id 'sb 1' is not valid"),
        (["exec", "-e", "A", "sb1", "--", "x"], 125, "--env 'A'"),
        (["exec", "sb1", "--", "\udcff"], 125, "not UTF-8"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_asked(
    words: list[str],
    code: int,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SANDMARTIN_DATA_DIR", os.fspath(tmp_path))
    assert main(words) == code
    err = capsys.readouterr().err
    assert says in err
    assert "no agent" not in err


def test_only_root_starts_an_agent(capsys: pytest.CaptureFixture[str]) -> None:
    uid = os.geteuid()
    if uid == 0:
        os.seteuid(65534)
    try:
        assert main(["run", "--data-dir", "/nonexistent", "--", "true"]) == 125
    finally:
        os.seteuid(uid)
    assert "hint: put sudo before this command" in capsys.readouterr().err


def test_talk_and_tables_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    error = Unavailable("guest said \x1b]0;owned\x07", hint="\x1b[2J")
    error.add_note("\r\x9b31m")
    say_error(error)
    print_table(("A", "B"), [("\x1b[31m", "ü"), ("long cell", "")])
    out, err = capsys.readouterr()
    assert not any(each in out + err for each in "\x1b\x07\r\x9b")
    assert "]0;owned" in err
    assert out.splitlines()[0].index("B") == out.splitlines()[1].index("ü")


# Work beside a body.


async def fail(error: Exception) -> None:
    raise error


async def last() -> None:
    try:
        await asyncio.Event().wait()
    finally:
        raise SandmartinError("while ending")


async def test_background_work_ends_with_the_body() -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async with background(work(), work()):
        await asyncio.sleep(0)
    assert ended == [True, True]


async def test_an_error_of_the_work_ends_the_body_and_comes_bare() -> None:
    async with asyncio.timeout(10):
        with pytest.raises(SandmartinError, match="first"):
            async with background(fail(SandmartinError("first"))):
                await asyncio.Event().wait()


async def test_the_first_error_is_the_one_that_comes_out() -> None:
    with pytest.raises(BrokenPipeError):
        async with background(last()):
            await asyncio.sleep(0)
            raise BrokenPipeError
