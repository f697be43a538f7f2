"""Environments with E2B's own packages and nothing of ours, as their users have them.

And what templates of tests are built from.

Kept outside the checkout, keyed by what is in them, as setup keeps what it builds: `scripts/test`
makes them before the tests, which have no way to a registry. An environment is made beside and
renamed whole.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_STORE = Path(os.environ.get("SANDMARTIN_ASSETS_DIR", "/var/cache/sandmartin")) / "clients"
#: The oldest that E2B's package for JavaScript runs on.
_NODE = "22"
_DEADLINE_S = 600
#: Not a checkout's own: environments are shared by all checkouts.
_PYTHON = Path(sys.executable).resolve()
#: Nothing of ours is on it.
PATH = "/usr/bin:/bin"


@dataclass(frozen=True)
class Environment:
    """Packages of one registry, by their exact versions."""

    kind: str
    packages: tuple[str, ...]
    #: Only the full tier uses it.
    full: bool = False

    @property
    def name(self) -> str:
        return self.packages[0]

    @property
    def path(self) -> Path:
        inputs = (self.kind, *self.packages, platform.python_version(), str(_PYTHON), _NODE)
        digest = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:12]
        return _STORE / f"{self.kind}-{digest}"

    @property
    def program(self) -> Path:
        """The interpreter of its language."""
        if self.kind == "python":
            return self.path / "bin/python"
        return self.path / "node_modules/node/bin/node"

    def ensure(self) -> None:
        """Make it, if it is not there."""
        _STORE.mkdir(parents=True, exist_ok=True)
        lock = _STORE / f".{self.path.name}.lock"
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            if self.path.is_dir():
                return
            print(f"making an environment with {', '.join(self.packages)}", file=sys.stderr)
            beside = Path(tempfile.mkdtemp(dir=_STORE, prefix=f".{self.path.name}."))
            try:
                _MAKERS[self.kind](beside, self.packages)
                beside.rename(self.path)
            finally:
                shutil.rmtree(beside, ignore_errors=True)


def _make_python(path: Path, packages: tuple[str, ...]) -> None:
    _run(str(_PYTHON), "-m", "venv", str(path))
    pip = (str(path / "bin/python"), "-m", "pip", "install", "--quiet")
    _run(*pip, "--disable-pip-version-check", *packages)


def _make_javascript(path: Path, packages: tuple[str, ...]) -> None:
    # With a runtime of its own, whatever brings npm.
    npm = ("npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(path))
    _run(*npm, f"node@{_NODE}", *packages)


def _fetch_wheels(path: Path, packages: tuple[str, ...]) -> None:
    """Packages for the Python of the template `base`, to be unpacked there."""
    pip = (str(_PYTHON), "-m", "pip", "download", "--quiet", "--disable-pip-version-check")
    of_base = ("--python-version=3.11", "--platform=manylinux2014_x86_64", "--only-binary=:all:")
    _run(*pip, *of_base, "--dest", str(path), *packages)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, timeout=_DEADLINE_S, stdin=subprocess.DEVNULL)


def variables(url: str, api_key: str) -> dict[str, str]:
    """All that a program in an environment is told: one address, without names or TLS."""
    return {"PATH": PATH, "E2B_API_KEY": api_key, "E2B_API_URL": url, "E2B_SANDBOX_URL": url}


_MAKERS: dict[str, Callable[[Path, tuple[str, ...]], None]] = {
    "python": _make_python,
    "javascript": _make_javascript,
    "wheels": _fetch_wheels,
}

NEWEST = Environment("python", ("e2b==2.63.0", "e2b-code-interpreter==2.11.5"))
JAVASCRIPT = Environment("javascript", ("e2b@2.51.0", "@e2b/code-interpreter@2.8.0"))
#: What the template of a test is built from.
FLASK = Environment("wheels", ("flask==3.1.2",), full=True)
#: Each with the newest release of the code interpreter's package that it was made for.
OLDER = tuple(
    Environment("python", (f"e2b=={version}", f"e2b-code-interpreter=={interpreter}"), full=True)
    for version, interpreter in (("2.45.1", "2.10.0"), ("2.20.3", "2.6.2"), ("2.7.0", "2.6.0"))
)


def main() -> None:
    """Make the environments of a tier of tests."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tier", choices=("default", "full"), default="default")
    tier = parser.parse_args().tier
    for each in (NEWEST, JAVASCRIPT, FLASK, *OLDER):
        if tier == "full" or not each.full:
            each.ensure()


if __name__ == "__main__":
    main()
