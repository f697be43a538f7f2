"""What an image says of itself: read from a file that anybody may have written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sandmartin.agent.assets import built_in_images
from sandmartin.agent.traits import Ready, Start, Traits
from sandmartin.errors import Invalid
from sandmartin.model import Shape

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_said_is_what_is_usual(tmp_path: Path) -> None:
    traits = Traits.of(tmp_path / "rootfs.ext4")
    assert (traits.shape, traits.starts) == (Shape(), False)


def test_comes_back_as_it_was_written(tmp_path: Path) -> None:
    start = Start(command="serve --all", user="user", cwd="/srv", envs={"A": "secret"})
    traits = Traits(vcpus=2, memory_mb=256, start=start, ready=Ready(port=80, path="/up?x=1"))
    traits.write(tmp_path / "rootfs.ext4")
    assert Traits.of(tmp_path / "rootfs.ext4") == traits
    assert traits.shape == Shape(vcpus=2, memory_mb=256)
    assert "secret" not in repr(traits)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b'{"unknown": 1}',
        b'{"memory_mb": 1}',
        b'{"vcpus": 1000}',
        b'{"start": {"command": ""}}',
        b'{"start": {"command": 7}}',
        b'{"start": {"command": "x", "user": ""}}',
        b'{"start": {"command": "x\\u0000"}}',
        b'{"start": {"command": "x", "envs": {"A=B": "c"}}}',
        b'{"start": {"command": "x", "envs": {"A": 1}}}',
        b'{"ready": {"port": 70000}}',
        b'{"ready": {"port": 80, "command": "true"}}',
        b'{"ready": {"port": 80, "path": "//host name/"}}',
        b'{"ready": {"port": 80, "path": "up"}}',
        b'{"ready": {"deadline_s": 0}}',
        b'{"ready": {"deadline_s": 1e9}}',
        b'{"start": "x"}',
        json.dumps({"start": {"command": "x" * (1 << 20)}}).encode(),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "template.json").write_bytes(content)
    with pytest.raises(Invalid):
        Traits.of(tmp_path / "rootfs.ext4")


def test_built_in_images_say_what_can_be_read() -> None:
    names = ["base", "code-interpreter-v1", "minimal", "node", "python311"]
    assert built_in_images() == names
    for name in names:
        Traits.of(ROOT / "images" / name / "rootfs.ext4")
    traits = Traits.of(ROOT / "images/code-interpreter-v1/rootfs.ext4")
    assert traits.starts and traits.ready.port == 49999
    assert not Traits.of(ROOT / "images/base/rootfs.ext4").starts
