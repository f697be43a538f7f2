"""What all tests share: an event loop, a private host, and honest words about what is left out."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandmartin.agent.assets import Assets
from sandmartin.errors import NotFound
from sandmartin.model import Settings
from tests import s3

_HERE = Path(__file__).parent
_BROWSER = "dashboard"
#: Folders whose tests boot VMs.
_ON_VMS = ("vm", "e2e", _BROWSER)
_POSTGRESQL = Path("/usr/lib/postgresql")


_TIERS = ("quick", "default", "full")
_left_out: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tier", choices=_TIERS, default="default", help="how much to run: see scripts/test"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what needs VMs, and leave out what the tier or the rights do not allow."""
    tier = config.getoption("tier")
    kept: list[pytest.Item] = []
    for item in items:
        if _folder(item) in _ON_VMS:
            item.add_marker(pytest.mark.vm)
            item.add_marker(pytest.mark.root)
        reason = _reason_to_leave_out(item, tier)
        if reason:
            _left_out[reason] += 1
        else:
            kept.append(item)
    # A browser's driver has its loop run in this thread until the session ends: nothing
    # asynchronous can follow it.
    items[:] = sorted(kept, key=lambda item: _folder(item) == _BROWSER)


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(_HERE).parts[0]


def _reason_to_leave_out(item: pytest.Item, tier: str) -> str:
    if item.get_closest_marker("vm") and tier == "quick":
        return "need a VM, which tier quick does not boot"
    if item.get_closest_marker("root") and os.geteuid() != 0:
        return "need root"
    if item.get_closest_marker("qemu_img") and shutil.which("qemu-img") is None:
        return "need qemu-img"
    if item.get_closest_marker("registry") and not _has_registry():
        return "need a registry of images (Debian: docker-registry, busybox-static, skopeo, umoci)"
    if _takes_postgresql(item) and not any(_POSTGRESQL.glob("*/bin/initdb")):
        return "need PostgreSQL (Debian: postgresql)"
    if item.get_closest_marker("s3") and not s3.binary().exists():
        return "need an S3 server, which scripts/test builds"
    if (template := item.get_closest_marker("template")) and template.args[0] not in _templates():
        return f"need the template {template.args[0]} (scripts/setup --template {template.args[0]})"
    if item.get_closest_marker("full") and tier != "full":
        return "run in tier full alone"
    if item.get_closest_marker("one_database") and _takes_postgresql(item) and tier != "full":
        return "show on PostgreSQL what SQLite has shown, in tier full alone"
    return ""


def _has_registry() -> bool:
    return all(map(shutil.which, ("docker-registry", "busybox", "skopeo", "umoci")))


@functools.cache
def _templates() -> frozenset[str]:
    """Names of the built-in templates that are built."""
    with contextlib.suppress(NotFound):
        return frozenset(Assets.find(Settings.load()).images)
    return frozenset()


def _takes_postgresql(item: pytest.Item) -> bool:
    """Whether a test is the one on PostgreSQL of those on both databases."""
    call = getattr(item, "callspec", None)
    return call is not None and "postgresql" in call.params.values()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """One of several processes tells the first what it left out."""
    if (told := getattr(session.config, "workeroutput", None)) is not None:
        told["left_out"] = dict(_left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Each process has looked at all tests, so that each leaves out the same."""
    _left_out.update(Counter(getattr(node, "workeroutput", {}).get("left_out", {})) - _left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reason, count in _left_out.items():
        terminalreporter.write_line(f"left out: {count} tests that {reason}")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests and fixtures run on asyncio, all of a session on one loop."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def logged_in_nowhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Verbs of a test are for what the test says, wherever its user may be logged in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        for name in ("SANDMARTIN_URL", "SANDMARTIN_API_KEY", "SANDMARTIN_DATA_DIR"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def private_host(request: pytest.FixtureRequest) -> Iterator[None]:
    """This process, and what it starts, in a network of its own: see `tests.world`.

    For all tests of a session that has some on VMs, and before the first of them: a thread stays
    in the network in which it was started, and libraries keep threads for life.
    """
    if not any(item.get_closest_marker("vm") for item in request.session.items):
        yield
        return
    from tests import world

    with world.private_host():
        yield
