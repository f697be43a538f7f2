"""Steps as E2B's SDKs send them."""

from __future__ import annotations

from typing import Any

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
    Place,
    Settled,
    settle,
)
from sandmartin.control.builds.e2b_steps import read_steps

_IMAGE = plan.Image("python:3.12")


def _step(word: str, *args: str, **more: Any) -> dict[str, Any]:
    return {"type": word, "args": list(args), "force": False} | more


def _settled(*steps: Any, ground: plan.Ground = _IMAGE, **options: Any) -> Settled:
    build = read_steps(steps, ground, **options)
    return settle(build.template, "image", Defaults(), {}, lambda place: str(place.origin))


def test_a_build() -> None:
    settled = _settled(
        _step("ENV", "A", "1", "B", "$HOME/x"),
        _step("COPY", "src", "app/", "", "", filesHash="abc123"),
        _step("COPY", "key", "/etc/key", "root", "0600", filesHash="def"),
        _step("WORKDIR", "/srv"),
        _step("RUN", "make", "root"),
        _step("RUN", "pip install ."),
        _step("USER", "other", "true"),
        start="serve",
        ready="sleep 20",
    )
    places = [each for each in settled.actions if isinstance(each, Place)]
    assert [(p.destination, p.owner, p.mode, p.origin) for p in places] == [
        ("/home/user/app", "user", None, plan.Upload("abc123")),
        ("/etc/key", "root", 0o600, plan.Upload("def")),
    ]
    make, install = (each for each in settled.actions if type(each) is Execute)
    assert (make.user, make.workdir) == ("root", "/srv")
    assert (install.user, install.argv[-1]) == ("user", "pip install .")
    (launch,) = settled.launches
    assert (launch.argv[-1], launch.user) == ("serve", "other")
    assert isinstance(settled.actions[-1], Launch)
    assert settled.defaults.envs["B"] == "/x"
    assert settled.defaults.check is not None
    assert settled.defaults.check.timeout_s == 0.0
    accounts = [each.name for each in settled.actions if isinstance(each, MakeAccount)]
    assert accounts == ["user", "other"]


def test_a_template_keeps_its_user() -> None:
    (run,) = _settled(_step("RUN", "a"), ground=plan.Template("base")).actions
    assert isinstance(run, Execute)
    assert (run.user, run.workdir) == ("root", "/")


def test_user_without_sudo_is_not_made() -> None:
    settled = _settled(_step("USER", "root"), ground=plan.Template("base"))
    assert settled.actions == ()
    assert settled.defaults.user == "root"


def test_force_holds_from_its_step_on() -> None:
    template = plan.Template("base")
    steps = [_step("RUN", "a"), _step("RUN", "b", force=True), _step("RUN", "c")]
    settled = _settled(*steps, ground=template)
    assert [each.cacheable for each in settled.actions] == [True, False, False]
    plain = _settled(*(_step("RUN", each) for each in "abc"), ground=template)
    # What is done all the same is the same.
    assert [each.key for each in settled.actions] == [each.key for each in plain.actions]
    for ground in (_IMAGE, template):
        forced = _settled(_step("RUN", "a"), ground=ground, force=True)
        assert not any(each.cacheable for each in forced.actions)


@pytest.mark.parametrize(
    ("step", "why"),
    [
        ("RUN", "has no type"),
        ({}, "has no type"),
        ({"type": "RUN", "args": "x"}, "no list of strings"),
        ({"type": "RUN", "args": [1]}, "no list of strings"),
        ({"type": "RUN", "other": 1}, "unknown 'other'"),
        (_step("FROM", "x"), "'FROM' is no step"),
        (_step("RUN"), "RUN has 0 arguments"),
        (_step("RUN", "a", "b", "c"), "RUN has 3 arguments"),
        (_step("RUN", ""), "RUN has 1 arguments"),
        (_step("RUN", "a\0"), "zero byte"),
        (_step("RUN", "a\ud800"), "no UTF-8"),
        (_step("COPY", "a", "b"), "COPY has no filesHash"),
        (_step("COPY", "a", "b", filesHash="../x"), "filesHash is no hash"),
        (_step("COPY", "a", "b", "", "rwx", filesHash="x"), "'rwx' is no mode"),
        (_step("ENV", "A"), "a name without a value"),
        (_step("ENV", "A", "1", "1", "x"), "no name of a variable"),
        (_step("ENV", "A", "${B:-x}"), "not supported"),
        (_step("USER", "a b"), "is no user"),
        (_step("WORKDIR", "$none"), "directory is empty"),
    ],
)
def test_refusals(step: Any, why: str) -> None:
    with pytest.raises(InvalidBuild, match=why) as caught:
        _settled(_step("RUN", "a"), step)
    assert caught.value.position is not None
    assert (caught.value.position.file, caught.value.position.line) == ("steps", 2)


def test_bounds() -> None:
    with pytest.raises(InvalidBuild, match="1000 are the most"):
        _settled(*[_step("RUN", "a")] * 1001)
    with pytest.raises(InvalidBuild, match="larger than"):
        _settled(_step("RUN", "a" * 300_000))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=4
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"type": st.sampled_from(["RUN", "COPY", "ENV", "WORKDIR", "USER", "x"])},
            optional={
                "args": st.lists(st.text(max_size=6), max_size=4) | _JSON,
                "filesHash": st.sampled_from(["a1", ""]) | _JSON,
                "force": _JSON,
            },
        )
        | _JSON,
        max_size=4,
    )
)
def test_whatever_is_sent_is_read_or_refused(steps: list[Any]) -> None:
    try:
        _settled(*steps)
    except InvalidBuild as error:
        assert error.message
