"""What a wheel packs beside the code, and what it is not built without."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hatch_build import PackedAssets

_GUEST = "guest/bin/sandmartin-guest"
_PAGE = "src/sandmartin/control/web/index.html"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout in which all is built."""
    monkeypatch.delenv("SANDMARTIN_GUEST_BINARY", raising=False)
    for name in (_GUEST, _PAGE, "images/base/packages"):
        tmp_path.joinpath(name).parent.mkdir(parents=True)
        tmp_path.joinpath(name).touch()
    return tmp_path


def pack(checkout: Path, version: str = "standard") -> dict[str, str]:
    """Where a build puts what the hook adds."""
    data: dict[str, Any] = {"force_include": {}}
    hook = PackedAssets(os.fspath(checkout), {}, None, None, "", "wheel")  # type: ignore[arg-type]
    hook.initialize(version, data)
    return {os.path.relpath(each, checkout): to for each, to in data["force_include"].items()}


def test_a_wheel_has_guest_images_and_dashboard(checkout: Path) -> None:
    assert pack(checkout) == {
        _GUEST: "sandmartin/agent/packed/sandmartin-guest",
        "images": "sandmartin/agent/packed/images",
        str(Path(_PAGE).parent): "sandmartin/control/web",
    }


@pytest.mark.parametrize(("missing", "hint"), [(_GUEST, "guest agent"), (_PAGE, "build.sh")])
def test_without_one_of_them_there_is_no_wheel(checkout: Path, missing: str, hint: str) -> None:
    checkout.joinpath(missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{missing} is missing.*{hint}"):
        pack(checkout)
    assert pack(checkout, "editable") == {}
