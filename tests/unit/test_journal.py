"""The data directory: entries that are old or new and never mixed, one holder, no token told."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandmartin.agent import proc
from sandmartin.agent.journal import DataDir, Entry, RamRecord, write_whole
from sandmartin.agent.memory import FileId
from sandmartin.agent.proc import ProcessId
from sandmartin.agent.vmm import VmRecord
from sandmartin.errors import Conflict, Invalid
from sandmartin.model import Accel, NetworkPolicy, SandboxSpec, State

_TOKEN = "a-token-that-nobody-may-see"
ENTRY = Entry(
    spec=SandboxSpec(
        sandbox_id="sbone",
        template="base",
        vcpus=2,
        timeout_s=9,
        network=NetworkPolicy(deny_out=("0.0.0.0/0",), allow_out=("*.example.com",)),
    ),
    state=State.RUNNING,
    created_at=1.5,
    last_active_at=2.5,
    reason="because",
    slot=3,
    token=_TOKEN,
    vm=VmRecord(
        process=ProcessId(12, 34),
        run_dir=Path("/d/sandboxes/sbone/vm"),
        vmm_version="7.2.22 (Debian)",
        machine="microvm",
        accel=Accel.TCG,
        memory_mb=512,
    ),
    ram=RamRecord("b" * 64, FileId(5, 6)),
    image=Path("/d/images/base/rootfs.ext4"),
    layers=("layer-one", "layer-two"),
    top="layer-three",
    next_top="layer-four",
    sleeps_in="checkpoints/cpone",
    boot_id="a-boot",
    envs={"KEY": _TOKEN},
    auto_paused=True,
    introduced=False,
    moved=True,
    flattens_to=Path("/d/images/new/rootfs.ext4"),
    envd_version="0.6.13",
)


@pytest.fixture
def data(reachable: Path) -> DataDir:
    made = DataDir(reachable / "data")
    made.open()
    return made


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A directory that every user can pass through, as a data directory has to be."""
    with tempfile.TemporaryDirectory(prefix="sandmartin-test-") as directory:
        Path(directory).chmod(0o711)
        yield Path(directory)


def test_entry_survives_the_disk() -> None:
    assert Entry.from_json(ENTRY.to_json()) == ENTRY
    early = Entry(spec=ENTRY.spec, state=State.PENDING, created_at=1.5, last_active_at=2.5)
    assert Entry.from_json(early.to_json()) == early


def test_entry_of_the_first_release_is_read() -> None:
    raw = json.loads(ENTRY.to_json())
    for later in ("introduced", "moved", "flattens_to", "envd_version"):
        del raw[later]
    del raw["spec"]["network"]
    old = Entry.from_json(json.dumps(raw).encode())
    spec = replace(ENTRY.spec, network=None)
    before = {"introduced": True, "moved": False, "flattens_to": None, "envd_version": ""}
    assert old == replace(ENTRY, spec=spec, **before)  # type: ignore[arg-type]


def test_token_is_never_told(data: DataDir) -> None:
    assert _TOKEN not in repr(ENTRY)
    paths = data.create(ENTRY)
    assert paths.entry.stat().st_mode & 0o777 == 0o600
    broken = json.loads(ENTRY.to_json())
    broken["created_at"] = [_TOKEN]
    del broken["spec"]
    for raw in (json.dumps(broken).encode(), b'{"format": 1, "token": "%s' % _TOKEN.encode()):
        with pytest.raises(Invalid) as caught:
            Entry.from_json(raw)
        assert _TOKEN not in str(caught.value)
        assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "change",
    [
        {"state": "flying"},
        {"spec": {"sandbox_id": "../../etc", "template": "base"}},
        {"spec": {"sandbox_id": "sbone", "template": "base", "colour": 1}},
        {"spec": None},
        {"vm": {"pid": 1}},
        {"vm": "x"},
        {"ram": {"base": "b"}},
        {"ram": {"base": "b", "file": [1]}},
        {"layers": 7},
        {"created_at": "yesterday"},
    ],
)
def test_what_is_no_entry_is_invalid(change: dict[str, Any]) -> None:
    raw = json.loads(ENTRY.to_json()) | change
    with pytest.raises(Invalid):
        Entry.from_json(json.dumps(raw).encode())


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff", b'"x"', b"{}"])
def test_what_is_no_journal_is_invalid(content: bytes) -> None:
    with pytest.raises(Invalid):
        Entry.from_json(content)


def test_unreadable_entries_are_listed_and_another_version_is_refused(data: DataDir) -> None:
    data.create(ENTRY)
    (data.sandboxes / "sbempty").mkdir()
    (data.sandboxes / "sbtorn").mkdir()
    (data.sandboxes / "sbtorn" / "journal.json").write_bytes(ENTRY.to_json()[:40])
    assert list(data.read_all()) == [("sbempty", None), ("sbone", ENTRY), ("sbtorn", None)]
    later = json.loads(ENTRY.to_json()) | {"format": 2}
    (data.sandboxes / "sbtorn" / "journal.json").write_text(json.dumps(later))
    # To take it for unreadable would be to throw away a sandbox that another version can run.
    with pytest.raises(Conflict, match="format 2"):
        list(data.read_all())


_WRITER = """
import sys
from pathlib import Path
from sandmartin.agent.journal import write_whole
n = 0
while True:
    write_whole(Path(sys.argv[1]), b"%d" % (n % 10) * 50_000, sync=n % 2 == 0)
    n += 1
    if n == 3: print("ready", flush=True)
"""


async def test_a_writer_killed_at_any_moment_leaves_old_or_new(tmp_path: Path) -> None:
    target = tmp_path / "entry"
    for _ in range(12):
        writer = proc.spawn_detached(
            [sys.executable, "-c", _WRITER, target], output=tmp_path / "said"
        )
        until = time.monotonic() + 10
        while (tmp_path / "said").stat().st_size == 0:
            assert time.monotonic() < until
            await asyncio.sleep(0.005)
        until = time.monotonic() + random.uniform(0, 0.02)
        while time.monotonic() < until:
            # Read while it is written: whole each time.
            content = target.read_bytes()
            assert len(content) == 50_000 and len(set(content)) == 1
        writer.kill(signal.SIGKILL)
        assert await writer.gone(5)
        content = target.read_bytes()
        assert len(content) == 50_000 and len(set(content)) == 1
        (tmp_path / "said").write_bytes(b"")


def test_a_write_that_fails_leaves_the_old_one_alone(tmp_path: Path) -> None:
    target = tmp_path / "entry"
    write_whole(target, b"old")
    with pytest.raises(TypeError):
        write_whole(target, "not bytes")  # type: ignore[arg-type]
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_directory_has_one_holder_and_keeps_its_name(data: DataDir) -> None:
    again = DataDir(data.path)
    with pytest.raises(Conflict, match="another agent"):
        again.open()
    data.close()
    again.open()
    assert again.instance_id == data.instance_id != ""
    again.close()
    (data.path / "instance.json").write_text('{"id": "../x"}')
    with pytest.raises(Invalid):
        again.open()
    # A failed open does not hold the lock.
    (data.path / "instance.json").unlink()
    data.open()
    assert data.instance_id not in {"", again.instance_id}


def test_directory_that_vms_cannot_reach_is_refused(reachable: Path) -> None:
    closed = reachable / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(Invalid, match=f"{closed} is closed") as caught:
        DataDir(closed / "data").open()
    assert f"chmod o+x {closed}" in caught.value.hint


def test_relative_directory_means_where_we_started(
    reachable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(reachable)
    assert DataDir(Path("data")).sandbox("sbone").layer("one").is_absolute()


def test_sandbox_directory_comes_and_goes(data: DataDir) -> None:
    paths = data.create(ENTRY)
    assert paths.path.stat().st_mode & 0o777 == paths.vm.stat().st_mode & 0o777 == 0o700
    with pytest.raises(FileExistsError):
        data.create(ENTRY)
    assert paths.entry.exists()
    (paths.vm / "monitor").touch()
    paths.layer("layer-one").touch()
    # What a killed writer left beside the entry goes too.
    (paths.path / ".journal.json.abcdef").touch()
    data.write(replace(ENTRY, state=State.STOPPING), sync=True)
    assert [entry and entry.state for _, entry in data.read_all()] == [State.STOPPING]
    data.remove("sbone")
    data.remove("sbone")
    assert list(data.read_all()) == []
