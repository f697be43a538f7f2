"""What the control plane asks an agent for, from what a caller asks for."""

from __future__ import annotations

import pytest

from sandmartin.control.requests import NewRow, spec_of
from sandmartin.control.tables import Template
from sandmartin.model import DEFAULT_MEMORY_MB, DEFAULT_VCPUS


@pytest.mark.parametrize(
    ("kind", "recommended", "asked", "given"),
    [
        ("image", (0, 0), (None, None), (DEFAULT_VCPUS, DEFAULT_MEMORY_MB)),
        ("image", (0, 0), (2, 256), (2, 256)),
        ("image", (2, 1024), (None, None), (2, 1024)),
        ("image", (2, 1024), (None, 256), (2, 256)),
        ("snapshot", (2, 1024), (1, 256), (2, 1024)),
    ],
)
def test_shape_of_a_sandbox(
    kind: str,
    recommended: tuple[int, int],
    asked: tuple[int | None, int | None],
    given: tuple[int, int],
) -> None:
    vcpus, memory_mb = recommended
    template = Template(
        agent_name="t", kind=kind, vcpus=vcpus, memory_mb=memory_mb, disk_size_mb=5120
    )
    spec = spec_of(NewRow(template="t", vcpus=asked[0], memory_mb=asked[1]), template)
    assert (spec.vcpus, spec.memory_mb) == given
