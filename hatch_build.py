"""Build hook: a wheel packs the guest binary, the image recipes and the dashboard.

It builds nothing itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PackedAssets(BuildHookInterface[Any]):
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
        web = Path(self.root, "src", "sandmartin", "control", "web")
        if not (web / "index.html").exists():
            raise FileNotFoundError(
                f"{web / 'index.html'} is missing: build the dashboard first, by"
                " `dashboard/build.sh build`"
            )
        images = Path(self.root, "images")
        packed = build_data["force_include"]
        packed[os.fspath(guest)] = "sandmartin/agent/packed/sandmartin-guest"
        packed[os.fspath(images)] = "sandmartin/agent/packed/images"
        # Git ignores it, and so would the wheel.
        packed[os.fspath(web)] = "sandmartin/control/web"
