"""Templates built on real VMs through `sandmartin up`, as a client asks for them."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import json
import statistics
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from clients.environments import FLASK
from tests.e2e.conftest import new_place
from tests.e2e.test_up import Up, clear, up
from tests.vm.test_oci import BUSYBOX, alpine_like

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.timeout(900)]
_DEADLINE_S = 240.0


@pytest.fixture(scope="module")
def one(private_host: None) -> Iterator[Up]:
    with new_place() as place:
        with up(place, "data", "--domain", "sandboxes.test") as one:
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
        "ENV COLOUR=sand\nWORKDIR /work\nRUN echo $COLOUR > made && chmod 777 .; echo told\n"
        "USER bird\nRUN id -un >> who\n"
    )
    built = build(one, "first", recipe(text), skip_pre_post=True)
    assert built["state"] == "ready", (built["error"], built["log"])
    assert "told" in built["log"].splitlines()
    assert (built["steps_total"], built["steps_done"], built["steps_cached"]) == (4, 4, 0)
    sandbox = one.create(template="first")
    said = one.sh(sandbox, "cat /work/made who; pwd; id -un; sudo id -un; echo $COLOUR")
    assert said.split() == ["sand", "bird", "/work", "bird", "root", "sand"]
    # And so has the guest itself, which E2B's clients ask.
    token = one.ask("GET", f"{sandbox}/access")["access_token"]
    host = f"49983-{sandbox.rpartition('/')[2]}.sandboxes.test"
    at = urlsplit(one.url)
    assert at.hostname and at.port
    with contextlib.closing(http.client.HTTPConnection(at.hostname, at.port, 60)) as line:
        line.request("GET", "/files?path=who", headers={"Host": host, "X-Access-Token": token})
        assert line.getresponse().read() == b"bird\n"
    one.curl("DELETE", sandbox, expect=204)
    assert one.ask("GET", "/sandboxes")["items"] == []


def test_a_step_that_fails_says_how(one: Up) -> None:
    built = build(one, "broken", recipe("RUN echo before; exit 7"), skip_pre_post=True)
    assert built["state"] == "failed"
    assert built["error"]["code"] == "build_failed" and built["error"]["step"] == 1
    assert "exited with 7: before" in built["error"]["message"]
    refused = one.ask("POST", "/builds", {"name": "x", "source": recipe("RUN a\nNOPE b")}, 400)
    assert refused["error"]["message"].startswith("recipe:2:1: ")


# Dockerfiles.


def send(one: Up, files: dict[str, bytes], tmp_path: Path, *, mode: int = 0o644) -> str:
    """Upload a context; its digest."""
    archive = tmp_path / "context.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            tar.addfile(info, io.BytesIO(content))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    one.curl("PUT", f"/builds/contexts/{digest}", "-T", str(archive), expect=204)
    return digest


def dockerfile(text: str) -> dict[str, Any]:
    return {"kind": "dockerfile", "text": text}


STAGES = """\
FROM base AS made
WORKDIR /out
RUN --mount=type=secret,id=word sha256sum < /run/secrets/word > digest; cat /run/secrets/word
RUN ls /run/secrets /run | grep -c word > left; ln -s digest named; mkdir deep; echo d > deep/er

FROM base
COPY --chown=user --chmod=640 a.txt b/*.txt /data/
COPY --from=made /out/named /data/one
COPY --from=made /out /data/all
RUN <<"END"
#!/usr/bin/env python3
import os
found = os.stat("/data/a.txt")
print(sorted(os.listdir("/data")), oct(found.st_mode), found.st_uid)
END
LABEL colour=sand
"""


def test_stages_secrets_and_files(one: Up, tmp_path: Path) -> None:
    context = send(one, {"a.txt": b"a", "b/x.txt": b"x", "b/y.md": b"y"}, tmp_path)
    secret = "a word that nobody says"
    more = {"context": context, "secrets": {"word": secret}}
    built = build(one, "stages", dockerfile(STAGES), **more)
    assert built["state"] == "ready", (built["error"], built["log"])
    assert "['a.txt', 'all', 'one', 'x.txt'] 0o100640 1000" in built["log"], built["log"]
    assert secret not in built["log"] and "***" in built["log"]
    sandbox = one.create(template="stages")
    told = one.sh(
        sandbox, "cat /data/one /data/all/left /data/all/deep/er; ls /run/secrets /out | wc -l"
    )
    digest = hashlib.sha256(secret.encode()).hexdigest()
    assert told.split() == [digest, "-", "0", "d", "0"]
    one.curl("DELETE", sandbox, expect=204)
    again = build(one, "stages", dockerfile(STAGES), **more)
    assert again["state"] == "ready" and again["steps_cached"] > 0, again["log"]


# Archives, and nothing.


@pytest.mark.full
def test_archives_become_templates(one: Up, tmp_path: Path) -> None:
    (archive := tmp_path / "image.tar").write_bytes(alpine_like().archive())
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    one.curl("PUT", f"/builds/contexts/{digest}", "-T", str(archive), expect=204)
    text = "RUN cat hello > /tmp/copied; id -u >> /tmp/copied\nUSER other\nRUN id -un > /tmp/who\n"
    built = build(one, "alpine", recipe(text), from_archive=digest, skip_pre_post=True)
    assert built["state"] == "ready", (built["error"], built["log"])
    sandbox = one.create(template="alpine")
    said = one.sh(sandbox, "cat /tmp/copied /tmp/who; id -un; echo $A")
    assert said.split() == ["hello", "1000", "other", "other", "b=c"]
    one.curl("DELETE", sandbox, expect=204)


def test_what_has_no_shell_is_built_from_nothing(one: Up, tmp_path: Path) -> None:
    # One static program, and the files that another stage made.
    text = (
        "FROM base AS made\nRUN mkdir /out && echo text > /out/file\n"
        "FROM scratch\nCOPY busybox /bin/cat\nCOPY --from=made /out/ /data/\n"
        'RUN ["/bin/cat", "/data/file"]\nUSER 12\nCMD ["/bin/cat", "/dev/zero"]\n'
        'HEALTHCHECK CMD ["/bin/cat", "/data/file"]\n'
    )
    context = send(one, {"busybox": BUSYBOX.read_bytes()}, tmp_path, mode=0o755)
    built = build(one, "bare", dockerfile(text), context=context)
    assert built["state"] == "ready", (built["error"], built["log"])
    sandbox = one.create(template="bare")
    said = one.ask("POST", f"{sandbox}/exec", {"cmd": "/bin/cat", "args": ["/data/file"]})
    assert (said["stdout"], said["exit_code"]) == ("text\n", 0)
    one.curl("DELETE", sandbox, expect=204)


# An application, warm.

FLASK_DOCKERFILE = """\
FROM base
COPY wheels /wheels
RUN mkdir /lib-app && for each in /wheels/*.whl; do python3 -m zipfile -e $each /lib-app; done
ENV PYTHONPATH=/lib-app PORT=8000
WORKDIR /srv
RUN sleep 2; python3 -m compileall -q /lib-app
EXPOSE 8000
HEALTHCHECK --interval=1s --retries=60 CMD python3 -c \
  "import urllib.request as u; u.urlopen('http://127.0.0.1:8000')"
CMD ["python3", "/srv/app.py"]
COPY app.py /srv/
"""
APP = """\
import os, flask
app = flask.Flask(__name__)
started = str(os.getpid())
@app.get("/")
def index():
    return "%s " + started
app.run("0.0.0.0", int(os.environ["PORT"]))
"""


def timed(one: Up, template: str, *, ask: bool) -> tuple[float, float, str]:
    """Seconds of a create, and until the first answer through the proxy; and what that is."""
    # Without a process for each request, which would be measured too.
    at = urlsplit(one.url)
    assert at.hostname and at.port
    with contextlib.closing(http.client.HTTPConnection(at.hostname, at.port, 60)) as line:
        line.connect()
        began_at = time.monotonic()
        body = json.dumps({"template": template, "memory_mb": 256})
        headers = {"X-API-Key": one.key, "Content-Type": "application/json"}
        line.request("POST", "/v1/sandboxes", body, headers)
        sandbox_id = json.loads(line.getresponse().read())["id"]
        created, said = time.monotonic() - began_at, ""
        if ask:
            line.request("GET", "/", headers={"Host": f"8000-{sandbox_id}.sandboxes.test"})
            said = line.getresponse().read().decode()
        answered = time.monotonic() - began_at
    one.curl("DELETE", f"/sandboxes/{sandbox_id}", expect=204)
    return created, answered, said


@pytest.mark.full
def test_an_application_starts_warm_and_is_built_again_quickly(one: Up, tmp_path: Path) -> None:
    wheels = {f"wheels/{each.name}": each.read_bytes() for each in FLASK.path.glob("*.whl")}
    assert wheels, "scripts/test fetches them"
    builds = []
    for word in ("first", "second"):
        context = send(one, {**wheels, "app.py": (APP % word).encode()}, tmp_path)
        built = build(one, "flask", dockerfile(FLASK_DOCKERFILE), context=context)
        assert built["state"] == "ready", (built["error"], built["log"])
        builds.append(built)
    took = [each["finished_at"] - each["started_at"] for each in builds]
    # What was only once is there already: the files, the packages, what they were compiled to.
    assert builds[1]["steps_cached"] >= 3, builds[1]["log"]
    # The first of each finds no memory of it in the host's cache.
    alone = [timed(one, "base", ask=False) for _ in range(6)][1:]
    warm = [timed(one, "flask", ask=True) for _ in range(6)][1:]
    created = statistics.median(each for each, _, _ in alone)
    answered = statistics.median(each for _, each, _ in warm)
    print(
        f"built in {took[0]:.1f} s, after a change of the last line in {took[1]:.1f} s;"
        f" create {created:.3f} s, of it {statistics.median(each for each, _, _ in warm):.3f} s,"
        f" to its first answer {answered:.3f} s"
    )
    # It was started once, before all of them.
    assert len({said for _, _, said in warm}) == 1 and warm[0][2].startswith("second ")
    assert took[1] < 0.6 * took[0]
    # It is twice as long at present, as the first answer runs code that no VM has run before.
    assert answered < 3 * created
