"""The environment of a Python kernel, and its random numbers."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Mapping, Sequence

#: What was there before what is for one execution alone; None where nothing was.
_before: dict[str, str | None] = {}


def change(
    new: Mapping[str, str], gone: Sequence[str], during: Mapping[str, str], reseed: bool
) -> None:
    """Set and remove variables; those in `during` until `restore`."""
    os.environ.update(new)
    for name in gone:
        os.environ.pop(name, None)
    for name, value in during.items():
        _before[name] = os.environ.get(name)
        os.environ[name] = value
    if reseed:
        _reseed()


def restore() -> None:
    """Take back what was for one execution alone."""
    while _before:
        name, value = _before.popitem()
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _reseed() -> None:
    """Draw other random numbers than the kernel that this one is a copy of."""
    random.seed()
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
    if (ssl := sys.modules.get("ssl")) is not None:
        ssl.RAND_add(os.urandom(32), 32.0)
