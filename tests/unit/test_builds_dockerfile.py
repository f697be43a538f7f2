"""Dockerfiles: real ones of many kinds, each rule on its own, and whatever anybody may send."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandmartin.context.source import InvalidBuild
from sandmartin.control.builds import plan
from sandmartin.control.builds.actions import Defaults, Execute, Place, Settled, settle
from sandmartin.control.builds.dockerfile import read_dockerfile

_FILES = Path(__file__).with_name("dockerfiles")
_S = TypeVar("_S", bound=plan.Step)


def _steps(text: str, kind: type[_S], **arguments: str) -> list[_S]:
    build = read_dockerfile(f"FROM x\n{text}", arguments=arguments)
    return [step for step in build.template.steps if isinstance(step, kind)]


def _settled(text: str, defaults: Defaults | None = None, **arguments: str) -> Settled:
    """The last stage, on an image that has `defaults`, with the earlier ones below it."""
    build = read_dockerfile(text, arguments=arguments)
    done: dict[str, Settled] = {}
    for stage in build.stages:
        below = done.get(stage.ground.name) if isinstance(stage.ground, plan.FromStage) else None
        done[stage.name] = settle(
            stage,
            below.key if below else "sha256:ground",
            below.defaults if below else defaults or Defaults(),
            dict(build.arguments),
            lambda place: f"files {place.sources}",
            is_template=stage is build.template,
        )
    return done[build.template.name]


# Real ones.


@pytest.mark.parametrize("file", sorted(_FILES.iterdir()), ids=lambda file: file.name)
def test_real_dockerfiles_are_read_and_settled(file: Path) -> None:
    text = file.read_text()
    settled = _settled(text)
    expected = re.findall(r"^#= (\w+): (.*)$", text, re.MULTILINE)
    assert expected
    found = {
        "start": [" ".join(launch.argv) for launch in settled.launches],
        "user": [settled.defaults.user],
        "workdir": [settled.defaults.workdir],
        "ports": [" ".join(settled.defaults.ports)],
        "env": [f"{name}={value}" for name, value in settled.defaults.envs.items()],
        "run": [each.argv[-1] for each in settled.actions if type(each) is Execute and each.argv],
        "copy": [
            f"{' '.join(each.sources)} > {each.destination}{'/' if each.into_directory else ''}"
            f" {each.owner}"
            for each in settled.actions
            if isinstance(each, Place)
        ],
        "stages": [" ".join(stage.name for stage in read_dockerfile(text).stages)],
        "notes": [note.sentence for note in read_dockerfile(text).notes],
        "check": [settled.defaults.check.command.words[-1]] if settled.defaults.check else [],
    }
    for kind, value in expected:
        assert value in found[kind]


# Lines.


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("RUN a \\\n  b", ["a   b"]),
        ("RUN a \\\n# comment\n\n  # another\n  && b", ["a   && b"]),
        ("RUN a \\  \nb", ["a b"]),
        ("run a\n  RuN b", ["a", "b"]),
        ("RUN a \\\\\nRUN b", ["a \\\\", "b"]),
        ("RUN a # no comment", ["a # no comment"]),
        ("RUN a\\", ["a"]),
        ("RUN a\r\nRUN b\r\n", ["a", "b"]),
        ("RUN\ta", ["a"]),
        ("RUN [1, 2]", ["[1, 2]"]),
        ("RUN [ -f x ] && y", ["[ -f x ] && y"]),
        ("RUN echo $V ${V}", ["echo $V ${V}"]),
    ],
)
def test_lines(text: str, commands: list[str]) -> None:
    assert [step.command.line for step in _steps(text, plan.Run)] == commands


def test_the_escape_directive() -> None:
    build = read_dockerfile("# syntax=docker/dockerfile:1\n# Escape = `\nFROM x\nRUN a `\n  b\\\n")
    (run,) = build.template.steps
    assert isinstance(run, plan.Run)
    assert run.command.line == "a   b\\"
    for text in ("# escape=x\nFROM x", "# escape=`\n# escape=\\\nFROM x"):
        with pytest.raises(InvalidBuild, match="escape"):
            read_dockerfile(text)
    # After anything else it is a comment.
    late = read_dockerfile("# a comment\n# escape=`\nFROM x\nRUN a \\\nb")
    assert len(late.template.steps) == 1


def test_exec_form() -> None:
    (run,) = _steps('RUN ["a b", "\\"c\\"", "$V"]', plan.Run)
    assert run.command.words == ("a b", '"c"', "$V")


# Heredocs.


def test_a_heredoc_is_a_script() -> None:
    (run, after) = _steps("RUN <<EOF\nset -e\nFROM nothing\n# kept\n\nEOF\nRUN b", plan.Run)
    assert run.command == plan.Command(line="set -e\nFROM nothing\n# kept\n\n", is_script=True)
    assert after.command.line == "b"


def test_a_heredoc_of_a_command_goes_to_the_shell_as_it_is() -> None:
    (run,) = _steps("RUN <<A cat - 3<<-'B' \\\n  > x\n$V\nA\n\tb\n\tB\n", plan.Run)
    assert run.command.line == "<<A cat - 3<<-'B'   > x\n$V\nA\n\tb\n\tB\n"


def test_a_script_that_names_its_interpreter() -> None:
    (action,) = _settled("FROM x\nRUN <<-EOF\n\t#!/usr/bin/env python3\n\tprint(1)\nEOF\n").actions
    assert isinstance(action, Execute)
    assert (action.argv, action.script) == ((), "#!/usr/bin/env python3\nprint(1)\n")


@pytest.mark.parametrize(
    "line", ['echo "<<EOF"', "cat<<EOF", "a <<< b", "echo $((1 << 2))", "x '<<E' y", "a << b"]
)
def test_what_is_no_heredoc(line: str) -> None:
    assert [step.command.line for step in _steps(f"RUN {line}\nRUN b", plan.Run)] == [line, "b"]


def test_files_that_stand_in_the_dockerfile() -> None:
    text = "FROM x\nENV V=1\nCOPY <<one <<'two' a /d/\n$V ${V:-2} \\$V \"q\" \\n\none\n$V\ntwo\n"
    (place,) = _settled(text).actions
    assert isinstance(place, Place)
    assert place.inline == (("one", '1 1 $V "q" \\n\n'), ("two", "$V\n"))
    assert place.sources == ("a",)


def test_a_heredoc_that_does_not_end() -> None:
    with pytest.raises(InvalidBuild, match=r"^Dockerfile:3:9: '<<EOF' is not closed"):
        read_dockerfile("FROM x\n\nRUN cat <<EOF\n EOF\n")
    with pytest.raises(InvalidBuild, match=r"^Dockerfile:4:3: "):
        read_dockerfile("FROM x\nCOPY <<E /x\nok\na ${V:\nE\n")


# Variables.

_ENV = {"A": "one", "E": ""}


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("$A", "one"),
        ("${A}x", "onex"),
        ("$Ax", ""),
        ("$none", ""),
        ("${A:-x}", "one"),
        ("${E:-x}", "x"),
        ("${E-x}", ""),
        ("${none-x}", "x"),
        ("${none:-${A}}", "one"),
        ("${none:-$A/b}", "one/b"),
        ("${none:-'a}b'}", "a}b"),
        ("${A:+x}", "x"),
        ("${E:+x}", ""),
        ("${E+x}", "x"),
        ("${none+x}", ""),
        ("${A:?no}", "one"),
        (r"\$A", "$A"),
        (r"\\$A", r"\one"),
        ("'$A'", "$A"),
        ('"$A b"', "one b"),
        (r'"\$A \" \x"', r'$A " \x'),
        ("a'b'\"c\"", "abc"),
        ("$", "$"),
        ("a$-b", "ab"),
        ("100%", "100%"),
        (r"a\ b", "a b"),
    ],
)
def test_expansion(written: str, value: str) -> None:
    settled = _settled(f"FROM x\nENV A=one E=\nENV X={written}\n")
    assert settled.defaults.envs["X"] == value


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("${A", r"Dockerfile:3:7: .*not closed|form that is not"),
        ("${A:-x", "not closed"),
        ("'a", "' is not closed"),
        ('"a', "is not closed"),
        ("${}", "has no name"),
        ("${A%x}", "not supported"),
        ("${A/x/y}", "not supported"),
        ("${none:?say-why}", "none is needed: 'say-why'"),
        ("${A:-" * 17 + "}" * 17, "deeper than 16"),
    ],
)
def test_bad_variables(written: str, why: str) -> None:
    with pytest.raises(InvalidBuild, match=why) as caught:
        _settled(f"FROM x\nENV A=\nENV X={written}\n")
    assert caught.value.position is not None
    assert caught.value.position.line == 3


def test_env_forms() -> None:
    envs = _settled(
        'FROM x\nENV a=hello\nENV a=bye b=$a\nENV c=$a\nENV old  two words $a \nENV q="x y" r=p\\ q'
    ).defaults.envs
    assert {name: envs[name] for name in "abcqr"} == {
        "a": "bye",
        "b": "hello",
        "c": "bye",
        "q": "x y",
        "r": "p q",
    }
    assert envs["old"] == "two words bye"


def test_values_of_the_image_are_known() -> None:
    settled = _settled(
        "FROM x\nENV PATH=/a:$PATH\nWORKDIR b\nRUN c",
        Defaults(envs={"PATH": "/usr/bin"}, workdir="/srv", user="app", shell=("/bin/bash", "-c")),
    )
    run = settled.actions[-1]
    assert isinstance(run, Execute)
    assert run.envs["PATH"] == "/a:/usr/bin"
    assert (run.workdir, run.user, run.argv) == ("/srv/b", "app", ("/bin/bash", "-c", "c"))


def test_arguments() -> None:
    text = "ARG V=1\nARG W=$V\nFROM x:$W\nARG V\nARG N\nARG D=d$V\nENV E=$V$D\nENV D=env\nRUN r\n"
    run = _settled(text).actions[0]
    assert isinstance(run, Execute)
    assert {name: run.envs.get(name) for name in "VNDE"} == {
        "V": "1",
        "N": None,
        "D": "env",
        "E": "1d1",
    }
    assert "V" not in _settled(text).defaults.envs
    given = _settled(text, V="2", N="n")
    run = given.actions[0]
    assert isinstance(run, Execute)
    assert (run.envs["N"], run.envs["E"]) == ("n", "2d2")
    assert read_dockerfile(text, arguments={"V": "2"}).template.ground == plan.Image("x:2")
    (note,) = read_dockerfile(text, arguments={"none": "1", "http_proxy": "p"}).notes
    assert "'none'" in note.sentence


@pytest.mark.parametrize("value", ["a\0b", "\ud800"])
def test_arguments_that_nobody_can_have(value: str) -> None:
    with pytest.raises(InvalidBuild, match="the argument 'V'"):
        read_dockerfile("FROM x", arguments={"V": value})


def test_arguments_that_docker_declares() -> None:
    run = _settled("FROM --platform=$TARGETPLATFORM x\nARG TARGETARCH\nRUN r").actions[0]
    assert isinstance(run, Execute)
    assert run.envs["TARGETARCH"] == "amd64"


# Stages.


def test_stages() -> None:
    text = (
        "FROM a AS One\nCMD ['x']\nFROM b AS unused\nFROM one as two\nARG X=1\n"
        "FROM scratch\nCOPY --from=0 /x /y\nCOPY --from=TWO /x /y\nCOPY --from=img:1 /x /y\n"
    )
    build = read_dockerfile(text)
    assert [stage.name for stage in build.stages] == ["one", "two", "3"]
    assert [stage.ground for stage in build.stages] == [
        plan.Image("a"),
        plan.FromStage("one"),
        plan.Scratch(),
    ]
    assert [step.origin for step in build.template.steps if isinstance(step, plan.Copy)] == [
        plan.FromStage("one"),
        plan.FromStage("two"),
        plan.Image("img:1"),
    ]
    assert read_dockerfile(text, target="unused").template.ground == plan.Image("b")
    with pytest.raises(InvalidBuild, match="no stage 'none'"):
        read_dockerfile(text, target="none")


def test_a_stage_on_a_stage_has_its_arguments_and_its_start() -> None:
    settled = _settled('FROM a AS one\nARG X=1\nCMD ["serve"]\nFROM one\nENV Y=$X\n')
    assert settled.defaults.envs["Y"] == "1"
    assert [launch.argv for launch in settled.launches] == [("serve",)]


# The start.


@pytest.mark.parametrize(
    ("text", "argv"),
    [
        ("RUN x", None),
        ('CMD ["a", "b"]', ("a", "b")),
        ("CMD a b", ("/bin/sh", "-c", "a b")),
        ('ENTRYPOINT ["e"]', ("e",)),
        ('CMD ["b"]\nENTRYPOINT ["e"]', ("e", "b")),
        ('ENTRYPOINT ["e"]\nCMD ["b"]\nCMD ["c"]', ("e", "c")),
        ('SHELL ["/bin/bash", "-c"]\nCMD a', ("/bin/bash", "-c", "a")),
        ('CMD ["mine"]', ("mine",)),
        ("CMD []", None),
    ],
)
def test_start_command(text: str, argv: tuple[str, ...] | None) -> None:
    launches = _settled(f"FROM x\n{text}", Defaults(cmd=("theirs",))).launches
    assert [launch.argv for launch in launches] == ([] if argv is None else [argv])


def test_the_entrypoint_of_the_image_takes_our_words() -> None:
    theirs = Defaults(entrypoint=("entry",), cmd=("theirs",))
    assert _settled('FROM x\nCMD ["mine"]', theirs).launches[0].argv == ("entry", "mine")
    assert _settled('FROM x\nENTRYPOINT ["mine"]', theirs).launches[0].argv == ("mine",)


def test_healthcheck() -> None:
    (step,) = _steps(
        "HEALTHCHECK --interval=1m30s --timeout=500ms --start-period=2s --retries=7 \\\n CMD a b",
        plan.Healthcheck,
    )
    assert step.check == plan.Check(plan.Command(line="a b"), 90.0, 0.5, 2.0, 5.0, 7)
    (step,) = _steps('HEALTHCHECK cmd ["a"]', plan.Healthcheck)
    assert step.check == plan.Check(plan.Command(("a",)), 30.0, 30.0, 0.0, 5.0, 3)
    (step,) = _steps("HEALTHCHECK NONE", plan.Healthcheck)
    assert step.check is None


def test_mounts() -> None:
    build = read_dockerfile(
        "FROM x\nRUN --mount=type=secret,id=token,env=TOKEN --mount=type=cache,target=/c"
        " --mount=type=secret,target=/etc/key,required,mode=0440,uid=5 make"
    )
    (run,) = build.template.steps
    assert isinstance(run, plan.Run)
    assert run.secrets == (
        plan.Secret("token", "", "TOKEN"),
        plan.Secret("key", "/etc/key", "", True, 0o440, 5),
    )
    assert run.command.line == "make"
    (note,) = build.notes
    assert (note.position.line, note.position.column) == (2, 52)


def test_copy_flags() -> None:
    (place,) = _settled('FROM x\nCOPY --chown=a:b --chmod=0755 --link ["a b", "/x/"]').actions
    assert isinstance(place, Place)
    assert (place.sources, place.owner, place.mode) == (("a b",), "a:b", 0o755)


def test_ports_and_labels() -> None:
    defaults = _settled(
        'FROM x\nENV P=81\nEXPOSE 80 $P/udp 8000-8002\nLABEL "a.b"="c d" e=f'
    ).defaults
    assert defaults.ports == ("80/tcp", "81/udp", "8000/tcp", "8001/tcp", "8002/tcp")
    assert defaults.labels == {"a.b": "c d", "e": "f"}


def test_what_has_no_effect_is_noted() -> None:
    notes = read_dockerfile("FROM x\nSTOPSIGNAL 9\n  VOLUME /a\nMAINTAINER me").notes
    assert [str(note.position) for note in notes] == [
        "Dockerfile:2:1",
        "Dockerfile:3:3",
        "Dockerfile:4:1",
    ]


# Refusals: each names the place, what stands there, and what to do.


@pytest.mark.parametrize(
    ("text", "place", "why"),
    [
        ("", None, "has no FROM"),
        ("RUN x", (1, 1), "comes before the first FROM"),
        ("FROM", (1, 1), "FROM IMAGE"),
        ("FROM a b", (1, 1), "FROM IMAGE"),
        ("FROM --platform=linux/arm64 a", (1, 17), "linux/arm64"),
        ("FROM --other=1 a", (1, 6), "'--other=1' is a flag"),
        ("FROM $none", (1, 6), "which is no image"),
        ("FROM a AS b c", (1, 1), "FROM IMAGE"),
        ("FROM a AS -", (1, 11), "no name of a stage"),
        ("FROM a AS b\nFROM c AS B", (2, 11), "earlier stage"),
        ("FROM a\nRUM x", (2, 1), "'RUM' is no instruction"),
        ("FROM a\n\n  $x", (3, 3), "no instruction"),
        ("FROM a\nRUN", (2, 1), "nothing after it"),
        ("FROM a\nRUN []", (2, 5), "empty command"),
        ("FROM a\nRUN \\\n  --security=insecure x", (3, 3), "not supported"),
        ("FROM a\nRUN --network=host x", (2, 15), "network"),
        ("FROM a\nRUN --mount=type=bind,source=. x", (2, 13), "type 'bind'"),
        ("FROM a\nRUN --mount=type=ssh x", (2, 13), "type 'ssh'"),
        ("FROM a\nRUN --mount=type=secret x", (2, 13), "names no secret"),
        ("FROM a\nONBUILD RUN x", (2, 1), "not supported"),
        ("FROM a\nCOPY a", (2, 1), "source and a destination"),
        ("FROM a\nCOPY --parents a b", (2, 6), "not supported"),
        ("FROM a\nCOPY --chmod=u+x a b", (2, 14), "octal"),
        ("FROM a\nCOPY --from=0 a b", (2, 1), "no such stage"),
        ("FROM a AS b\nCOPY --from=b a b", (2, 1), "its own stage"),
        ("FROM a\nCOPY --chown=x --chown=y a b", (2, 24), "second --chown"),
        ("FROM a\nADD https://x/y /z", (2, 5), "not supported"),
        ("FROM a\nADD git@x:y /z", (2, 5), "not supported"),
        ("FROM a\nENV x", (2, 5), "has no value"),
        ("FROM a\nENV a=b c", (2, 9), "has no value"),
        ("FROM a\nENV 1a=b", (2, 5), "no name of a variable"),
        ("FROM a\nARG a-=b c d!", (2, 12), "no name of a variable"),
        ("FROM a\nWORKDIR", (2, 1), "nothing after it"),
        ("FROM a\nSHELL bash", (2, 1), "needs a list"),
        ("FROM a\nHEALTHCHECK curl x", (2, 1), "neither NONE nor CMD"),
        ("FROM a\nHEALTHCHECK --interval=5 CMD x", (2, 24), "no duration"),
        ("FROM a\nHEALTHCHECK --interval=999999h CMD x", (2, 24), "too long"),
        ("FROM a\nHEALTHCHECK --retries=x CMD x", (2, 23), "no number"),
        ("FROM a\nRUN a\0b", (2, 6), "zero byte"),
        ("FROM a\nRUN ä\ud800b", (2, 6), "UTF-8"),
        ('FROM a\nRUN ["a", "\\u0000"]', (2, 5), "no command can have"),
        ('FROM a\nCMD ["a", "\\ud800"]', (2, 5), "no command can have"),
    ],
)
def test_refusals(text: str, place: tuple[int, int] | None, why: str) -> None:
    with pytest.raises(InvalidBuild) as caught:
        read_dockerfile(text)
    assert why in f"{caught.value.message}; {caught.value.hint}"
    position = caught.value.position
    assert (position and (position.line, position.column)) == place
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("COPY a b /c", "must end with a slash"),
        ("COPY $none /c", "a source is empty"),
        ("ADD ${none:-https://x/y} /z", "ADD of an address"),
        ("USER a b", "is no user"),
        ("USER $none", "the user is empty"),
        ("EXPOSE x", "is no port"),
        ("EXPOSE 0", "is no port"),
        ("EXPOSE 1-65535", "is no port"),
        ("EXPOSE 70000", "is no port"),
    ],
)
def test_refusals_that_need_values(text: str, why: str) -> None:
    with pytest.raises(InvalidBuild, match=rf"^Dockerfile:2:\d+: .*{why}"):
        _settled(f"FROM x\n{text}")


# Bounds.


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("FROM x\n" + "#" * 300_000, "larger than"),
        ("FROM x\n" + "\n" * 20_000, "more than 10000 lines"),
        ("FROM x\n" + "RUN x\n" * 1001, "one instruction too many"),
        ("FROM x\n" * 51, "one stage too many"),
        ("FROM x\nENV A=aaaaaaaaaaaaaaaa\n" + "ENV A=$A$A$A$A\n" * 30, "longer than"),
        ("FROM x\n" + "".join(f"ENV A{n}={'x' * 1000}\n" for n in range(200)), "longer than"),
        ("FROM x\nENV A=" + "x" * 2000 + "\nRUN x\nLABEL a=" + "$A" * 100, "longer than"),
    ],
)
def test_bombs(text: str, why: str) -> None:
    started = time.process_time()
    with pytest.raises(InvalidBuild, match=why):
        _settled(text)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "text",
    [
        "FROM x\nRUN " + "[" * 100_000,
        "FROM x\nRUN " + "\\\n" * 9_000 + "x",
        "FROM x\nENV A=" + "${A:-" * 50_000,
        "FROM x\nENV A=" + "'\"" * 100_000,
        "FROM x\nCOPY " + "<<A " * 9_000 + "/x\n" + "A\n" * 9_000,
        "FROM x\nLABEL " + "a=b " * 60_000,
        "FROM x\nRUN " + "--mount=type=cache " * 10_000 + "x",
        "FROM x\nHEALTHCHECK --interval=" + "1s" * 100_000 + " CMD x",
    ],
)
def test_nothing_takes_for_ever(text: str) -> None:
    started = time.process_time()
    try:
        _settled(text)
    except InvalidBuild as error:
        assert len(error.message) < 400
    assert time.process_time() - started < 8


_WORDS = (
    'FROM RUN COPY ENV ARG x $A ${A:-b} ${ } \' " \\ <<E E [ ] "a" , --from=0 --mount= = a=b AS'
    " HEALTHCHECK CMD --interval=1s ENTRYPOINT USER WORKDIR # ` ä \t"
)
_LINE = st.lists(st.sampled_from(_WORDS.split(" ")), max_size=6).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(_LINE, max_size=8).map("\n".join))
def test_whatever_is_sent_is_read_or_refused(text: str) -> None:
    for source in (text, f"FROM x\n{text}"):
        try:
            _settled(source)
        except InvalidBuild as error:
            assert error.message
            if error.position is not None and error.position.file == "Dockerfile":
                assert 1 <= error.position.line <= source.count("\n") + 1


@settings(max_examples=200, deadline=None)
@given(st.text("ab$ '\"\\{}:-x", max_size=30))
def test_a_value_that_was_quoted_is_itself(value: str) -> None:
    quoted = "".join(f"\\{char}" for char in value)
    assert _settled(f"FROM x\nENV V=x{quoted}x\n").defaults.envs["V"] == f"x{value}x"


# Keys.


def _keys(text: str, files: str = "f", ground: str = "g", **arguments: str) -> list[str]:
    build = read_dockerfile(text, arguments=arguments)
    settled = settle(build.template, ground, Defaults(), arguments, lambda _: files)
    return [action.key for action in settled.actions]


_KEYED = "FROM x\nARG V=1\nRUN a\nCOPY s /d\nENV E=1\nRUN --mount=type=secret,id=s b\n"


def test_keys_are_the_same_for_the_same() -> None:
    assert _keys(_KEYED) == _keys(_KEYED)
    # How it is written, and what it does not depend on, does not matter.
    assert _keys(_KEYED) == _keys("# c\n" + _KEYED.replace("RUN a", "\nrun \\\n a"))
    assert len(set(_keys(_KEYED))) == 3


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (_keys(_KEYED, ground="h"), 0),
        (_keys(_KEYED.replace("RUN a", "RUN c")), 0),
        (_keys(_KEYED, V="2"), 0),
        (_keys(_KEYED, files="h"), 1),
        (_keys(_KEYED.replace("/d", "/e")), 1),
        (_keys(_KEYED.replace("E=1", "E=2")), 2),
        (_keys(_KEYED.replace("id=s", "id=t")), 2),
        (_keys(_KEYED.replace("ENV E", "USER u\nENV E")), 2),
        (_keys(_KEYED.replace("ENV E", 'SHELL ["sh"]\nENV E')), 2),
    ],
)
def test_a_key_depends_on_all_before_it(other: list[str], same: int) -> None:
    kept = [one == two for one, two in zip(_keys(_KEYED), other, strict=True)]
    assert kept == [True] * same + [False] * (3 - same)
