"""E2B's own packages, unchanged, on a real `up`: all they are told is a key and where it is.

That is one address for everything, or a domain in which sandboxes have names.

The programs are in `stock`, and run where nothing of ours is installed.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from clients.environments import JAVASCRIPT, NEWEST, OLDER, PATH, Environment, variables
from tests.e2e.conftest import Place, new_place
from tests.e2e.test_up import Up, clear, up

pytestmark = pytest.mark.timeout(400)

_STOCK = Path(__file__).with_name("stock")
_LIFE_S = 300
#: A resolver that knows names below `localhost`, for programs that leave them to the machine's.
_NAMES = _STOCK / "names"
_RESOLVER = {
    "PYTHONPATH": str(_NAMES),
    "NODE_OPTIONS": f"--require={_NAMES / 'localhost.cjs'}",
}
_NEWEST = [
    "create",
    "run",
    "background",
    "pty",
    "files",
    "signed",
    "ports",
    "watch",
    "timeout",
    "pause",
    "wake",
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
    "e2b==2.7.0": {"fork", "network", "snapshot", "wake"},
}


@pytest.fixture(scope="module")
def home(private_host: None) -> Iterator[Place]:
    """One for all, so that what serves side by side knows of each other."""
    with new_place() as place:
        yield place


@pytest.fixture(scope="module")
def served(home: Place) -> Iterator[Up]:
    with up(home, "e2b", "--on-exit", "kill") as running:
        yield running
    clear(home, "e2b")


@dataclass(frozen=True)
class Named:
    """An `up` whose sandboxes have names, and what a program needs to know of it."""

    up: Up
    variables: dict[str, str]


@pytest.fixture(scope="module")
def named(home: Place) -> Iterator[Named]:
    """With a certificate as `sandmartin certs` makes it."""
    made = home.run("certs", "bank", "--dir", os.fspath(home.path / "certs"), "--json")
    assert made.returncode == 0, made.stderr
    certs = json.loads(made.stdout)
    tls = ("--tls-cert", certs["cert"], "--tls-key", certs["key"])
    with up(home, "named", "--on-exit", "kill", "--domain", certs["domain"], *tls) as one:
        domain = f"{certs['domain']}:{one.url.rpartition(':')[2]}"
        told = {"E2B_DOMAIN": domain, "SSL_CERT_FILE": certs["issuer"]}
        # Node looks elsewhere.
        told |= {"NODE_EXTRA_CA_CERTS": certs["issuer"]}
        yield Named(one, {"PATH": PATH, "E2B_API_KEY": one.key, **told})
    clear(home, "named")


def live(
    served: Up, environment: Environment, *words: str, told: Mapping[str, str] | None = None
) -> list[str]:
    """The steps that went as they must, by a program of an environment.

    It is told one address for everything, or what is `told`.
    """
    assert environment.path.is_dir(), "scripts/test makes the environments"
    done = subprocess.run(
        [environment.program, *words],
        env=told or variables(served.url, served.key),
        capture_output=True,
        text=True,
        timeout=_LIFE_S,
        check=False,
    )
    said = f"{done.stdout}\n{done.stderr}\n{served.log.read_text()[-3000:]}"
    assert done.returncode == 0, said
    return done.stdout.split()


@pytest.mark.parametrize("kind", ["sync", pytest.param("async", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "environment",
    [NEWEST, *(pytest.param(each, marks=pytest.mark.full) for each in OLDER)],
    ids=lambda each: each.name,
)
def test_a_life_by_the_package_for_python(served: Up, environment: Environment, kind: str) -> None:
    lacks = _LACKS[environment.name]
    expected = [each for each in _NEWEST if each not in lacks]
    assert live(served, environment, str(_STOCK / "life.py"), kind) == expected


_CODE = ["state", "plot", "table", "error", "streamed", "contexts", "envs", "languages"]


@pytest.mark.template("code-interpreter-v1")
@pytest.mark.full
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_code_by_the_package_for_python(served: Up, kind: str) -> None:
    assert live(served, NEWEST, str(_STOCK / "interpret.py"), kind) == _CODE


@pytest.mark.full
@pytest.mark.template("code-interpreter-v1")
@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("environment", OLDER, ids=lambda each: each.name)
def test_code_by_older_packages(named: Named, environment: Environment, kind: str) -> None:
    """They know no other way to an interpreter than its name."""
    words = (str(_STOCK / "interpret.py"), kind)
    assert live(named.up, environment, *words, told=named.variables | _RESOLVER) == _CODE


_LIFE_BY_JAVASCRIPT = [each for each in _NEWEST if each not in {"ports", "timeout", "network"}]
_CODE_BY_JAVASCRIPT = ["state", "plot", "error", "contexts"]


def test_a_life_by_the_package_for_javascript(served: Up, tmp_path: Path) -> None:
    program = beside_packages(tmp_path, "life.mjs")
    assert live(served, JAVASCRIPT, program) == _LIFE_BY_JAVASCRIPT


@pytest.mark.template("code-interpreter-v1")
def test_code_by_the_package_for_javascript(served: Up, tmp_path: Path) -> None:
    program = beside_packages(tmp_path, "interpret.mjs")
    assert live(served, JAVASCRIPT, program) == _CODE_BY_JAVASCRIPT


@pytest.mark.full
def test_names_and_tls_are_all_that_javascript_needs(named: Named, tmp_path: Path) -> None:
    program = beside_packages(tmp_path, "life.mjs")
    told = named.variables | _RESOLVER
    assert live(named.up, JAVASCRIPT, program, told=told) == _LIFE_BY_JAVASCRIPT


@pytest.mark.full
@pytest.mark.template("code-interpreter-v1")
def test_code_by_names_and_tls_by_javascript(named: Named, tmp_path: Path) -> None:
    program = beside_packages(tmp_path, "interpret.mjs")
    told = named.variables | _RESOLVER
    assert live(named.up, JAVASCRIPT, program, told=told) == _CODE_BY_JAVASCRIPT


@pytest.mark.parametrize("kind", ["sync", pytest.param("async", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "environment",
    [NEWEST, *(pytest.param(each, marks=pytest.mark.full) for each in OLDER)],
    ids=lambda each: each.name,
)
def test_templates_by_the_package_for_python(
    served: Up, environment: Environment, kind: str
) -> None:
    steps = ["builds", "exists", "starts", "again", "tags", "failing", "background"]
    assert live(served, environment, str(_STOCK / "build.py"), kind) == steps


@pytest.mark.full
def test_templates_by_the_package_for_javascript(served: Up, tmp_path: Path) -> None:
    steps = ["builds", "exists", "starts", "tags", "failing"]
    assert live(served, JAVASCRIPT, beside_packages(tmp_path, "build.mjs")) == steps


def beside_packages(directory: Path, name: str) -> str:
    """A program in JavaScript where its packages are looked for: beside it."""
    program = directory / name
    program.write_bytes((_STOCK / name).read_bytes())
    (directory / "node_modules").symlink_to(JAVASCRIPT.path / "node_modules")
    return str(program)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_names_and_tls_are_all_that_the_package_needs(named: Named, kind: str) -> None:
    steps = ["create", "run", "files", "signed", "ports", "wake", "kill"]
    words = (str(_STOCK / "life.py"), kind, *steps)
    assert live(named.up, NEWEST, *words, told=named.variables) == steps
