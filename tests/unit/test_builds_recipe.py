"""Recipes: the instructions, their defaults, and what is put around them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandmartin.context.source import InvalidBuild
from sandmartin.control.builds import plan
from sandmartin.control.builds.actions import (
    Defaults,
    Execute,
    Launch,
    MakeAccount,
    MakeDirectory,
    Place,
    Settled,
    settle,
)
from sandmartin.control.builds.recipe import read_recipe

_BASE = plan.Template("base")
#: A service that runs code: what a recipe is mostly written for.
_SERVICE = """\
# Packages
USER root
RUN --timeout=5m apt-get install -y --no-install-recommends \\
    python3-venv
USER runner
WORKDIR /home/runner/app
COPY requirements.txt server ./
ENV VENV=/home/runner/venv
ENV PATH="$VENV/bin:$PATH"
ENV PRICE=$$5 ${none}x
RUN python3 -m venv $VENV && pip install -r requirements.txt
START python3 -m server --port 8888
HEALTHCHECK --interval=2s --timeout=5s --start-period=1m curl -fsS http://localhost:8888/health
"""


def _settled(text: str, *, skip_pre_post: bool = True) -> Settled:
    build = read_recipe(text, _BASE, skip_pre_post=skip_pre_post)
    defaults = Defaults(envs={"PATH": "/bin"}, user="user", workdir="/home/user")
    return settle(build.template, "base", defaults, {}, lambda _: "files")


def test_a_service() -> None:
    settled = _settled(_SERVICE)
    assert [type(action) for action in settled.actions] == [
        MakeAccount,
        Execute,
        MakeAccount,
        MakeDirectory,
        Place,
        Execute,
        Launch,
    ]
    install, place, pip, launch = (settled.actions[index] for index in (1, 4, 5, 6))
    assert isinstance(install, Execute)
    assert (install.timeout_s, install.user) == (300.0, "root")
    assert isinstance(place, Place)
    assert (place.destination, place.owner) == ("/home/runner/app", "runner")
    assert (place.into_directory, place.timeout_s) == (True, 60.0)
    assert isinstance(pip, Execute)
    assert (pip.timeout_s, pip.user, pip.workdir) == (30.0, "runner", "/home/runner/app")
    assert pip.argv == (
        "/bin/sh",
        "-c",
        "python3 -m venv $VENV && pip install -r requirements.txt",
    )
    assert isinstance(launch, Launch)
    assert launch.argv[-1] == "python3 -m server --port 8888"
    assert settled.launches == (launch,)
    assert settled.defaults.envs == {
        "PATH": "/home/runner/venv/bin:/bin",
        "VENV": "/home/runner/venv",
        "PRICE": "$5 x",
    }
    assert settled.defaults.check == plan.Check(
        plan.Command(
            words=("/bin/sh", "-c", "curl -fsS http://localhost:8888/health"),
        ),
        interval_s=2.0,
        timeout_s=5.0,
        start_period_s=60.0,
        start_interval_s=2.0,
        retries=0,
    )


def test_defaults_of_a_check() -> None:
    check = _settled("HEALTHCHECK true").defaults.check
    assert check is not None
    assert (check.interval_s, check.timeout_s, check.start_period_s) == (3.0, 10.0, 0.0)
    assert check.retries == 0


def test_what_is_put_around() -> None:
    build = read_recipe("RUN a", _BASE)
    phases = [step.phase for step in build.template.steps]
    assert phases == [*["pre"] * 3, "build", "post"]
    actions = _settled("USER other\nRUN a", skip_pre_post=False).actions
    first, last = actions[0], actions[-1]
    assert isinstance(first, Execute)
    assert isinstance(last, Execute)
    assert (first.user, last.user) == ("root", "root")
    assert (first.timeout_s, last.timeout_s) == (600.0, 600.0)
    assert "apt-get update" in first.argv[-1]
    assert any(isinstance(each, MakeAccount) and each.name == "user" for each in actions)
    assert read_recipe("", _BASE, skip_pre_post=True).template.steps == ()


def test_nothing_is_kept_once_a_process_runs() -> None:
    settled = _settled("RUN a\nSTART b\nRUN c")
    assert [action.cacheable for action in settled.actions] == [True, False, False]


def test_a_heredoc_is_no_part_of_the_language() -> None:
    (run, after) = read_recipe("RUN cat <<E\nRUN b", _BASE, skip_pre_post=True).template.steps
    assert isinstance(run, plan.Run)
    assert run.command.line == "cat <<E"
    assert isinstance(after, plan.Run)


@pytest.mark.parametrize(
    ("text", "place", "why"),
    [
        ("", None, "has no instruction"),
        ("FROM x", (1, 1), "'FROM' is no instruction"),
        ("\n run", (2, 2), "nothing after it"),
        ("RUN --timeout=1", (1, 15), "no duration"),
        ("RUN --timeout=0 a", (1, 15), "leaves no time"),
        ("RUN --timeout=1s", (1, 1), "nothing after it"),
        ("RUN --user=a b", (1, 5), "not supported"),
        ("ENV A", (1, 5), "sets no variable"),
        ("ENV 1=2", (1, 5), "sets no variable"),
        ("ENV A=${B", (1, 7), "not supported"),
        ("COPY a", (1, 6), "no destination"),
        ("COPY /a b", (1, 6), "leaves the uploaded files"),
        ("COPY x ../a b", (1, 8), "leaves the uploaded files"),
        ("USER a:b", (1, 6), "no name of a user"),
        ("HEALTHCHECK --interval=0 x", (1, 24), "no interval"),
        ("HEALTHCHECK a\nHEALTHCHECK b", (2, 1), "second HEALTHCHECK"),
        ("HEALTHCHECK --retries=-1 a", (1, 23), "no number"),
        ("RUN a\n" * 1001, (1001, 1), "too many"),
    ],
)
def test_refusals(text: str, place: tuple[int, int] | None, why: str) -> None:
    with pytest.raises(InvalidBuild, match=why) as caught:
        read_recipe(text, _BASE)
    position = caught.value.position
    assert (position and (position.line, position.column)) == place


@settings(max_examples=200, deadline=None)
@given(st.text("RUNSTAEVHLCOPY =$\\{}-\n\tab/.\"'", max_size=60))
def test_whatever_is_sent_is_read_or_refused(text: str) -> None:
    for word in ("", "RUN ", "ENV A=", "COPY ", "USER ", "WORKDIR ", "HEALTHCHECK "):
        try:
            _settled(word + text)
        except InvalidBuild as error:
            assert error.message
