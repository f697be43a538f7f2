"""The choice of the accelerator: what is remembered, for how long, and what a demand is worth.

No guest boots here: the kernel is no kernel, so a probe ends at once, on hosts with and without
KVM alike. What boots is tested with the VMs.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sandmartin.agent.vmm.accel import AccelChoice, choose_accel
from sandmartin.agent.vmm.qemu import Qemu
from sandmartin.errors import ToolFailed, Unavailable
from sandmartin.model import Accel


def _program(path: Path, accels: str) -> Path:
    """Says what QEMU says of itself, and then is no QEMU."""
    path.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        '--version) echo "QEMU emulator version 7.2.0";;\n'
        f"-accel) echo 'Accelerators supported in QEMU binary:'; printf '{accels}\\n';;\n"
        "*) echo 'no such machine' >&2; exit 1;;\n"
        "esac\n"
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def both(tmp_path: Path) -> Qemu:
    return Qemu(_program(tmp_path / "both", "tcg\\nkvm"))


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(b"none")
    return path


def _plant(cache_dir: Path, **verdict: object) -> None:
    """Change what is remembered, and nothing of what it is remembered for."""
    cache = cache_dir / "kvm-probe.json"
    kept = json.loads(cache.read_bytes())
    kept["verdict"] |= verdict
    cache.write_text(json.dumps(kept))


async def test_answer_is_remembered_until_what_it_depends_on_changes(
    tmp_path: Path, both: Qemu, kernel: Path
) -> None:
    async def choose(wanted: Accel = Accel.AUTO, *, fresh: bool = False) -> AccelChoice:
        return await choose_accel(wanted, kernel, kernel, tmp_path, fresh=fresh, qemu=both)

    found = await choose()
    assert found.accel is Accel.TCG
    assert found.reason.startswith("/dev/kvm ")
    _plant(tmp_path, reason="planted", hint="a hint")
    assert await choose() == AccelChoice(Accel.TCG, "planted", "a hint")
    with pytest.raises(Unavailable, match="planted") as caught:
        await choose(Accel.KVM)
    assert caught.value.hint == "a hint"
    assert await choose(fresh=True) == found
    assert await choose() == found
    _plant(tmp_path, works=True, reason="planted")
    assert await choose(Accel.KVM) == AccelChoice(Accel.KVM, "planted")
    kernel.write_bytes(b"another")
    assert await choose() == found


@pytest.mark.parametrize("content", ["", "[]", '{"key": []}', '{"key": 1, "verdict": null}'])
async def test_damaged_memory_is_none(
    tmp_path: Path, both: Qemu, kernel: Path, content: str
) -> None:
    first = await choose_accel(Accel.AUTO, kernel, kernel, tmp_path, qemu=both)
    (tmp_path / "kvm-probe.json").write_text(content)
    assert await choose_accel(Accel.AUTO, kernel, kernel, tmp_path, qemu=both) == first


async def test_what_cannot_be_remembered_is_still_known(
    tmp_path: Path, both: Qemu, kernel: Path, caplog: pytest.LogCaptureFixture
) -> None:
    choice = await choose_accel(Accel.AUTO, kernel, kernel, tmp_path / "absent", qemu=both)
    assert choice.accel is Accel.TCG
    assert "cannot be remembered" in caplog.text


async def test_built_in_accelerators_bound_the_choice(tmp_path: Path, kernel: Path) -> None:
    tcg, kvm = (Qemu(_program(tmp_path / each, each)) for each in ("tcg", "kvm"))
    choice = await choose_accel(Accel.AUTO, kernel, kernel, tmp_path, qemu=tcg)
    assert choice.accel is Accel.TCG
    assert choice.reason.endswith("is built without KVM")
    assert await choose_accel(Accel.TCG, kernel, kernel, tmp_path, qemu=tcg) == AccelChoice(
        Accel.TCG, "chosen by setting"
    )
    for wanted in (Accel.TCG, Accel.AUTO):
        with pytest.raises(ToolFailed, match="no tcg accelerator"):
            await choose_accel(wanted, kernel, kernel, tmp_path, qemu=kvm)
