"""Parts that `pip install sandmartin` alone does not bring."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sandmartin.errors import Unavailable


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around the import of a part that needs the extra `name`. Raises Unavailable without it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "sandmartin":
            raise
        raise Unavailable(
            f"this needs the extra {name!r}, which is not installed ({error.name} is missing)",
            hint=f"pip install 'sandmartin[{name}]'",
        ) from error
