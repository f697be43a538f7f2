"""`sandmartin template build` on a real `up`: from a directory to a sandbox that answers."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import COMMAND, Place
from tests.e2e.test_up import Up, clear, up
from tests.waiting import DEADLINE_S

pytestmark = pytest.mark.timeout(300)

_DOCKERFILE = """\
FROM base
ARG WHO=nobody
COPY index.html /srv/
RUN --mount=type=secret,id=t echo for $WHO $(wc -c </run/secrets/t) >/srv/who
"""


def say(served: Up, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words],
        env=environment(served),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def environment(served: Up) -> dict[str, str]:
    told = {"SANDMARTIN_URL": served.url, "SANDMARTIN_API_KEY": served.key, "TOKEN": "hush"}
    return os.environ | told


@pytest.mark.full
def test_a_directory_becomes_a_template(place: Place, tmp_path: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "index.html").write_text("hello\n")
    (app / "Dockerfile").write_text(_DOCKERFILE)
    with up(place, "build", "--on-exit", "kill") as served:
        flags = ["--build-arg", "WHO=me", "--secret", "id=t,env=TOKEN", "--tag", "v1"]
        built = say(served, "template", "build", str(app), *flags)
        assert (built.returncode, built.stdout) == (0, "app\n"), built.stderr
        assert "[2/2] RUN --mount=type=secret" in built.stderr
        ran = say(served, "run", "-t", "app:v1", "--", "cat", "/srv/who", "/srv/index.html")
        assert (ran.returncode, ran.stdout) == (0, "for me 4\nhello\n"), ran.stderr

        (app / "Dockerfile").write_text(_DOCKERFILE + "RUN echo why >&2; exit 7\n")
        failed = say(served, "template", "build", str(app), "--secret", "id=t,env=TOKEN")
        assert (failed.returncode, failed.stdout) == (1, "")
        shown = "5 | RUN echo why >&2; exit 7\n  | ^\nsandmartin: Dockerfile:5:1: "
        assert shown in failed.stderr
        assert "exited with 7" in failed.stderr

        (app / "Dockerfile").write_text("FROM base\nRUN echo begun; sleep 300\n")
        cancel_while_it_runs(served, app)
        assert "cancelled" in say(served, "template", "builds").stdout.splitlines()[1]
    clear(place, "build")


def cancel_while_it_runs(served: Up, app: Path) -> None:
    words = [*COMMAND, "template", "build", str(app), "--name", "slow"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, env=environment(served), stderr=pipe, text=True) as building:
        assert building.stderr is not None
        for line in building.stderr:
            if line.endswith("begun\n"):
                building.send_signal(signal.SIGINT)
                break
        assert building.wait(DEADLINE_S) == 128 + signal.SIGINT
    # It ends soon then.
    build = served.ask("GET", "/builds?limit=1")["items"][0]["id"]
    served.curl("GET", f"/builds/{build}/logs", "-H", "Accept: text/event-stream")
