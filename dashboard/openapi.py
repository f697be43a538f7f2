"""Prints the OpenAPI document of the native API, of which the dashboard's types are made."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

from sandmartin.control.app import create_app
from sandmartin.control.platform import Platform

_OURS = ("/v1/", "/auth/")


def document() -> dict[str, Any]:
    """The document without what is there for the clients of others."""
    # Routes are only declared; no request is served.
    settings = SimpleNamespace(base_url="http://localhost", domain="")
    platform = cast(Platform, SimpleNamespace(settings=settings, telemetry=None))
    whole = create_app(platform).openapi()
    paths = {path: item for path, item in whole["paths"].items() if path.startswith(_OURS)}
    return whole | {"paths": paths}


if __name__ == "__main__":
    print(json.dumps(document()))
