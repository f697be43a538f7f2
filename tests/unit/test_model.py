"""Ids, states and settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandmartin.errors import BY_CODE, Conflict, Invalid, SandmartinError, from_code
from sandmartin.model import (
    INTERNET,
    MAX_NETWORK_RULES,
    TRANSITIONS,
    NetworkPolicy,
    SandboxSpec,
    Settings,
    Shape,
    State,
    WarmAhead,
    check_name,
    check_transition,
    new_sandbox_id,
)


def test_sandbox_ids_fit_into_a_host_name() -> None:
    assert len({check_name(new_sandbox_id(), "id") for _ in range(100)}) == 100
    assert "-" not in new_sandbox_id()


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "-a", "a\0", "a" * 65])
def test_names_that_must_not_reach_a_path(name: str) -> None:
    with pytest.raises(Invalid):
        check_name(name, "name")


@pytest.mark.parametrize(
    "wrong", [{"vcpus": 0}, {"vcpus": -1}, {"memory_mb": 0}, {"memory_mb": -5}, {"timeout_s": -1}]
)
def test_impossible_shapes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(Invalid):
        SandboxSpec(sandbox_id="sb1", template="base", **wrong)  # type: ignore[arg-type]


def test_every_state_has_its_transitions() -> None:
    assert set(TRANSITIONS) == set(State)
    assert not TRANSITIONS[State.STOPPED]
    with pytest.raises(Conflict):
        check_transition(State.STOPPED, State.RUNNING, "sandbox")


def test_an_error_is_rebuilt_from_its_code() -> None:
    for code, kind in BY_CODE.items():
        assert type(from_code(code, "sentence")) is kind
    assert type(from_code("unheard of", "sentence")) is SandmartinError


def test_settings_prefer_flags_to_environment_to_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("slot_pool_size = 1\ndisk_floor_mb = 2\nboot_timeout_s = 3.5\n")
    environ = {"SANDMARTIN_SLOT_POOL_SIZE": "5", "SANDMARTIN_DISK_FLOOR_MB": "6"}
    settings = Settings.load({"slot_pool_size": 7, "data_dir": None}, environ, file)
    assert (settings.slot_pool_size, settings.disk_floor_mb) == (7, 6)
    assert settings.boot_timeout_s == 3.5
    with pytest.raises(Invalid):
        Settings.load({}, {"SANDMARTIN_SLOT_POOL_SIZE": "many"})


def test_shapes_are_written_as_vcpus_and_memory() -> None:
    environ = {"SANDMARTIN_WARM_SHAPES": "1x512, 2x1024", "SANDMARTIN_WARM_AHEAD": "base,py3=4x128"}
    settings = Settings.load({}, environ)
    assert settings.warm_shapes == (Shape(), Shape(vcpus=2, memory_mb=1024))
    small = Shape(vcpus=4, memory_mb=128)
    assert settings.warm_ahead == (
        WarmAhead(template="base"),
        WarmAhead(template="py3", shape=small),
    )
    assert Shape.parse(str(small)) == small
    empty = Settings.load({}, {"SANDMARTIN_WARM_SHAPES": " ", "SANDMARTIN_WARM_AHEAD": ""})
    assert (empty.warm_shapes, empty.warm_ahead) == ((), ())


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("WARM_SHAPES", "1x512,", "'' is no shape; one is written 2x1024"),
        ("WARM_SHAPES", "512", "'512' is no shape"),
        ("WARM_SHAPES", "-1x512", "is no shape"),
        ("WARM_SHAPES", "1x1\u0661\u0661", "is no shape"),
        ("WARM_SHAPES", "0x512", "shape 0x512 is impossible; use 1 to 64 vCPUs"),
        ("WARM_SHAPES", "1x127", "at least 128 MiB"),
        ("WARM_AHEAD", "../base", "'../base' names no template"),
        ("WARM_AHEAD", "base=", "'' is no shape"),
    ],
)
def test_what_is_no_shape_is_said(name: str, text: str, said: str) -> None:
    with pytest.raises(Invalid) as caught:
        Settings.load({}, {f"SANDMARTIN_{name}": text})
    assert f"setting {name.lower()} is" in caught.value.message
    assert said in caught.value.message


def test_a_policy_has_one_form() -> None:
    policy = NetworkPolicy(
        allow_out=("1.1.1.1", "1.1.1.1/32", " API.Example.com. ", "*.Example.org", "10.1.2.3/8"),
        deny_out=("0.0.0.0/0", "1.2.3.4"),
    )
    assert policy.allow_out == ("1.1.1.1", "api.example.com", "*.example.org", "10.0.0.0/8")
    assert [str(each) for each in policy.allowed_networks] == ["1.1.1.1/32", "10.0.0.0/8"]
    assert policy.allowed_names == ("api.example.com", "*.example.org")
    assert [str(each) for each in policy.denied_networks] == ["0.0.0.0/0", "1.2.3.4/32"]
    nothing = NetworkPolicy(allow_internet_access=False, deny_out=("1.2.3.4",))
    assert [str(each) for each in nothing.denied_networks] == ["0.0.0.0/0"]
    for each in (policy, nothing, INTERNET):
        assert NetworkPolicy.from_dict(each.to_dict()) == each


@pytest.mark.parametrize(
    "wrong",
    [
        {"deny_out": ("example.com",)},
        {"deny_out": ("*.example.com",)},
        *(
            {"allow_out": (each,)}
            for each in (
                "",
                "*",
                "*.",
                ".",
                "a..b",
                "*.*.b",
                "a.*",
                "-a.b",
                "a b",
                "a/b",
                "a,b",
                "a }; flush ruleset; {",
                "a.b\nflush ruleset",
                "::1",
                "1.2.3",
                "1.2.3.4.5",
                "1.2.3.4/33",
                "1.2.3.4:80",
                "b\u00fccher.example",
                "a" * 64 + ".b",
                ".".join(["abc"] * 64),
            )
        ),
        {"allow_out": tuple(f"n{each}.example" for each in range(MAX_NETWORK_RULES + 1))},
    ],
)
def test_policies_that_can_never_be(wrong: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(Invalid):
        NetworkPolicy(**wrong)  # type: ignore[arg-type]
