"""E2B's own packages, unchanged, on a real `up`: a key and two addresses are all they are told.

The programs are in `stock`, and run where nothing of ours is installed.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import new_place
from tests.e2e.environments import JAVASCRIPT, NEWEST, OLDER, Environment
from tests.e2e.test_up import Up, clear, up

pytestmark = pytest.mark.timeout(400)

_STOCK = Path(__file__).with_name("stock")
_LIFE_S = 300
_BASIC = ["create", "run", "background", "pty", "files", "watch"]
_NEWEST = [
    *_BASIC,
    "timeout",
    "pause",
    "fork",
    "snapshot",
    "paging",
    "metrics",
    "network",
    "kill",
]
#: What a release has no call for.
_LACKS = {
    "e2b==2.63.0": set(),
    "e2b==2.45.1": set(),
    "e2b==2.20.3": {"fork", "network"},
    "e2b==2.7.0": {"fork", "network", "snapshot"},
}


@pytest.fixture(scope="module")
def served(private_host: None) -> Iterator[Up]:
    """One for all programs."""
    with new_place() as place:
        with up(place, "e2b", "--on-exit", "kill") as running:
            yield running
        clear(place, "e2b")


def live(served: Up, environment: Environment, *words: str) -> list[str]:
    """The steps that went as they must, by a program of an environment."""
    assert environment.path.is_dir(), "scripts/test makes the environments"
    done = subprocess.run(
        [environment.program, *words],
        env={
            "PATH": "/usr/bin:/bin",
            "E2B_API_KEY": served.key,
            "E2B_API_URL": served.url,
            "E2B_SANDBOX_URL": served.url,
        },
        capture_output=True,
        text=True,
        timeout=_LIFE_S,
        check=False,
    )
    said = f"{done.stdout}\n{done.stderr}\n{served.log.read_text()[-3000:]}"
    assert done.returncode == 0, said
    return done.stdout.split()


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize(
    "environment",
    [NEWEST, *(pytest.param(each, marks=pytest.mark.full) for each in OLDER)],
    ids=lambda each: each.name,
)
def test_a_life_by_the_package_for_python(served: Up, environment: Environment, kind: str) -> None:
    lacks = _LACKS[environment.name]
    expected = [each for each in _NEWEST if each not in lacks]
    assert live(served, environment, str(_STOCK / "life.py"), kind) == expected


@pytest.mark.template("code-interpreter-v1")
@pytest.mark.parametrize("kind", ["sync", pytest.param("async", marks=pytest.mark.full)])
def test_code_by_the_package_for_python(served: Up, kind: str) -> None:
    steps = ["state", "plot", "table", "error", "streamed", "contexts", "envs", "languages"]
    assert live(served, NEWEST, str(_STOCK / "interpret.py"), kind) == steps


def test_a_life_by_the_package_for_javascript(served: Up, tmp_path: Path) -> None:
    # Packages are looked for beside the program.
    program = tmp_path / "life.mjs"
    program.write_bytes((_STOCK / "life.mjs").read_bytes())
    (tmp_path / "node_modules").symlink_to(JAVASCRIPT.path / "node_modules")
    steps = [*_BASIC, "pause", "paging", "snapshot", "kill"]
    assert live(served, JAVASCRIPT, str(program)) == steps
