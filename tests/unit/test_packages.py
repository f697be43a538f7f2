"""What is missing is found, and said in a line that can be run."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandmartin.agent import packages
from sandmartin.agent.packages import PACKAGES, Package, find_missing, install_line
from sandmartin.errors import ToolFailed


def test_a_package_is_proved_by_its_program_or_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "our-own-program"
    by_name, by_path = Package("one", program.name), Package("two", str(program))
    assert not by_name.present() and not by_path.present()
    program.write_text("#!/bin/sh\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert by_path.present()
    # A program is one that can be executed.
    assert not by_name.present()
    program.chmod(0o755)
    assert by_name.present()
    # Without sbin in our own PATH too.
    assert Package("three", "ldconfig").present() == Path("/sbin/ldconfig").exists()


def test_missing_are_named_once_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = [Package("b", "absent-1"), Package("a", "/absent/2"), Package("b", "absent-3")]
    monkeypatch.setattr(packages, "PACKAGES", (*absent, Package("c", "/bin/sh")))
    assert find_missing() == ["a", "b"]
    assert install_line(["a", "b"]).endswith("apt-get install --no-install-recommends a b")


def test_every_child_program_of_ours_comes_with_a_package() -> None:
    names = {package.proof for package in PACKAGES}
    assert {"qemu-system-x86_64", "qemu-img", "mke2fs", "setpriv", "nsenter"} <= names
    assert all(package.name == package.name.lower().strip() for package in PACKAGES)


async def test_failed_installation_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("apt-get", "sudo"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'the lock is held' >&2\nexit 100\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    # As root apt fails, as anybody else sudo does.
    with pytest.raises(ToolFailed) as caught:
        await packages.install(["one", "two"])
    assert caught.value.hint == f"run: {install_line(['one', 'two'])}"
