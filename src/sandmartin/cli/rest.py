"""The verbs' way to a control plane: its REST API, as far as verbs for administrators need it.

Where it is and who asks stands in SANDMARTIN_URL and SANDMARTIN_API_KEY; a key is never a word of
the command line, which other users of a machine see.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx

from sandmartin.errors import Invalid, SandmartinError, Unavailable, from_code

_CALL_S = 90.0
_CONNECT_S = 5.0


class Rest:
    """The REST API of one control plane. Every failure is a SandmartinError."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url
        try:
            self._http = httpx.Client(
                base_url=url,
                headers={"x-api-key": key},
                timeout=httpx.Timeout(_CALL_S, connect=_CONNECT_S),
            )
        except (httpx.InvalidURL, UnicodeError) as error:
            raise Invalid("SANDMARTIN_URL or SANDMARTIN_API_KEY is not valid") from error

    def close(self) -> None:
        self._http.close()

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """What it answers; None where it answers nothing. Raises what it says, Unavailable."""
        try:
            response = self._http.request(method, path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise Unavailable(
                f"the control plane at {self._url} cannot be reached ({type(error).__name__})",
                hint="is SANDMARTIN_URL right, and does it run?",
            ) from error
        answer = _parse(response)
        if not response.is_success:
            raise _error_of(answer, response.status_code)
        return answer


def _parse(response: httpx.Response) -> Any:
    try:
        return json.loads(response.content) if response.content else None
    except ValueError as error:
        raise Unavailable(
            f"what answers (HTTP {response.status_code}) is no control plane",
            hint="is SANDMARTIN_URL right?",
        ) from error


def _error_of(answer: Any, status: int) -> SandmartinError:
    told = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(told, dict):
        return Unavailable(f"the control plane answered HTTP {status} without saying why")
    return from_code(*(str(told.get(name) or "") for name in ("code", "message", "hint")))


@contextmanager
def rest() -> Iterator[Rest]:
    """The control plane that the environment names. Raises Invalid."""
    url, key = (os.environ.get(f"SANDMARTIN_{name}", "") for name in ("URL", "API_KEY"))
    if not url or not key:
        raise Invalid(
            "SANDMARTIN_URL and SANDMARTIN_API_KEY do not say which control plane is meant",
            hint="set both, as `sandmartin up` and `sandmartin control` print them",
        )
    made = Rest(url, key)
    try:
        yield made
    finally:
        made.close()
