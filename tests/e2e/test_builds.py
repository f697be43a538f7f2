"""Templates built on real VMs through `sandmartin up`, as a client asks for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.conftest import new_place
from tests.e2e.test_up import Up, clear, up

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.timeout(900)]
_DEADLINE_S = 240.0


@pytest.fixture(scope="module")
def one(private_host: None) -> Iterator[Up]:
    with new_place() as place:
        with up(place, "data") as one:
            yield one
        clear(place, "data")


def build(one: Up, name: str, source: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A build at its end, with its log."""
    wanted = {"name": name, "source": source, "memory_mb": 256, **more}
    made = one.ask("POST", "/builds", wanted, 202)
    until = time.monotonic() + _DEADLINE_S
    while made["finished_at"] is None:
        assert time.monotonic() < until, log_of(one, made)
        time.sleep(0.2)
        made = one.ask("GET", f"/builds/{made['id']}")
    return {**made, "log": log_of(one, made)}


def log_of(one: Up, made: dict[str, Any]) -> str:
    lines = one.ask("GET", f"/builds/{made['id']}/logs?limit=1000")["items"]
    return "\n".join(each["message"] for each in lines)


def recipe(text: str) -> dict[str, Any]:
    return {"kind": "recipe", "text": text, "file": "recipe"}


def test_a_recipe_becomes_a_template(one: Up) -> None:
    text = (
        "ENV COLOUR=sand\nWORKDIR /work\nRUN echo $COLOUR > made && echo told\n"
        "USER bird\nRUN id -un >> who\n"
    )
    built = build(one, "first", recipe(text), skip_pre_post=True)
    assert built["state"] == "ready", (built["error"], built["log"])
    assert "told" in built["log"].splitlines()
    assert (built["steps_total"], built["steps_done"], built["steps_cached"]) == (4, 4, 0)
    sandbox = one.create(template="first")
    assert one.sh(sandbox, "cat /work/made /work/who; pwd; id -un; echo $COLOUR").split() == [
        *("sand", "bird"),
        *("/work", "bird", "sand"),
    ]
    one.curl("DELETE", sandbox, expect=204)
    assert one.ask("GET", "/sandboxes")["items"] == []
