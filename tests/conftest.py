"""What all tests share: one event loop kind, and honest words about what a run leaves out."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests and fixtures run on asyncio, all of a session on one loop."""
    return "asyncio"
