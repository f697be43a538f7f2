"""Build hook: a wheel packs the guest binary and the image recipes; it builds nothing itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PackedAssets(BuildHookInterface):
    """Adds what `scripts/setup` or the release built; an editable install needs none of it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable" or self.target_name != "wheel":
            return
        default = Path(self.root, "guest", "bin", "sandmartin-guest")
        guest = Path(os.environ.get("SANDMARTIN_GUEST_BINARY", default))
        if not guest.exists():
            raise FileNotFoundError(
                f"{guest} is missing: build the guest agent first, or name it in"
                " SANDMARTIN_GUEST_BINARY"
            )
        build_data["force_include"][os.fspath(guest)] = "sandmartin/agent/packed/sandmartin-guest"
        images = os.fspath(Path(self.root, "images"))
        build_data["force_include"][images] = "sandmartin/agent/packed/images"
