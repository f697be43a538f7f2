"""References, manifests and what registries say, and the cache of layers; nothing is asked."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from sandmartin.agent.blobs import Blobs
from sandmartin.agent.reference import Reference
from sandmartin.agent.registry import RegistryAuth, _choose, _read, explain
from sandmartin.errors import Denied, Invalid, NotFound, SandmartinError, Unavailable
from tests.ociimages import OciImage

DIGEST = f"sha256:{'0a' * 32}"


@pytest.mark.parametrize(
    ("text", "whole", "place"),
    [
        ("alpine", "docker.io/library/alpine:latest", ("registry-1.docker.io", 443)),
        ("alpine:3.19", "docker.io/library/alpine:3.19", ("registry-1.docker.io", 443)),
        ("team/app", "docker.io/team/app:latest", ("registry-1.docker.io", 443)),
        ("index.docker.io/app", "docker.io/library/app:latest", ("registry-1.docker.io", 443)),
        ("localhost/app", "localhost/app:latest", ("localhost", 443)),
        ("localhost:5000/a/b_c:V1", "localhost:5000/a/b_c:V1", ("localhost", 5000)),
        ("r.example/a__b--c/d.e", "r.example/a__b--c/d.e:latest", ("r.example", 443)),
        (f"r.example:80/app:1@{DIGEST}", f"r.example:80/app@{DIGEST}", ("r.example", 80)),
    ],
)
def test_references_are_read_as_docker_reads_them(
    text: str, whole: str, place: tuple[str, int]
) -> None:
    reference = Reference.parse(text)
    assert str(reference) == whole
    assert (reference.host, reference.port) == place


@pytest.mark.parametrize(
    "text",
    [
        *("", "/", "App", "app:", "app:-", "app@", "app@sha256:1", f"app@{DIGEST}0", "a b", "a//b"),
        *("https://r.example/app", "user:word@r.example/app", "r.example:0/a", "r.example:99999/a"),
        *("-r.example/app", "../app", "r.example/../app", "app:1:2", "--help", "a" * 2000),
        *("r.example/app\n", "[::1]:5000/app", "r.example/app?x", "oci:/etc", "dir:/etc"),
    ],
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="is no image of a registry"):
        Reference.parse(text)


def test_of_an_index_our_platform_is_chosen() -> None:
    def entry(digest: str, architecture: str) -> dict[str, object]:
        return {"digest": digest, "platform": {"os": "linux", "architecture": architecture}}

    other = f"sha256:{'1' * 64}"
    assert _choose({"manifests": [entry(other, "arm64"), entry(DIGEST, "amd64")]}) == DIGEST
    assert _choose({"layers": []}) is None
    for manifests in ([entry(other, "arm64")], [entry("sha512:1", "amd64")], [1], 1):
        with pytest.raises(Invalid):
            _choose({"manifests": manifests})


def test_manifests_that_cannot_be_used_are_refused() -> None:
    made = OciImage([b"layer"])
    assert _read(made.manifest).digest == made.digest
    assert _read(made.manifest).size_bytes == len(made.packed[0])
    whole = json.loads(made.manifest)
    layer = whole["layers"][0]
    for change, word in (
        ({"schemaVersion": 1}, "no longer used"),
        ({"layers": [layer | {"mediaType": "application/x.tar+zstd"}]}, "zstd"),
        ({"layers": [layer] * 600}, "600 layers"),
        ({"layers": [layer | {"digest": "../../etc/passwd"}]}, "no manifest"),
        ({"layers": [layer | {"size": "much"}]}, "no manifest"),
        ({"layers": [layer | {"urls": ["http://elsewhere.example"]}]}, "elsewhere"),
        ({"layers": 1}, "no manifest"),
    ):
        with pytest.raises(Invalid, match=word):
            _read(json.dumps(whole | change).encode())
    for content in (b"", b"[]", b"[" * 10**6, b"\xff"):
        with pytest.raises(Invalid, match="no manifest"):
            _read(content)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("reading manifest 1 in r/app: manifest unknown: manifest unknown", NotFound),
        ("reading manifest 1 in r/app: unauthorized: authentication required", Denied),
        ("requested access to the resource is denied", Denied),
        ("pinging container registry r: Get x: x509: certificate signed by unknown", Unavailable),
        ("toomanyrequests: You have reached your pull rate limit", Unavailable),
        ("something else", Unavailable),
        ("", Unavailable),
    ],
)
def test_what_a_registry_says_becomes_an_error_of_ours(
    said: str, kind: type[SandmartinError]
) -> None:
    line = f'time="2026" level=fatal msg="Error \\"{said}\\" at https://r/x?X-Signature=secret"\n'
    error = explain(Reference.parse("r.example/app"), line if said else said)
    assert type(error) is kind
    assert "secret" not in f"{error} {error.hint}"


def test_credentials_do_not_show_themselves() -> None:
    assert "word" not in repr(RegistryAuth("name", "word"))


def blob(content: bytes, directory: Path) -> tuple[str, int]:
    """The digest of a blob in a file, and the file opened."""
    name = hashlib.sha256(content).hexdigest()
    path = directory / f"in-{name}"
    path.write_bytes(content)
    return f"sha256:{name}", os.open(path, os.O_RDONLY)


@pytest.mark.root
def test_a_blob_goes_in_and_out_whole_or_not_at_all(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    blobs = Blobs(kept, 1 << 20)
    digest, handle = blob(b"content", tmp_path)
    other, _ = blob(b"other", tmp_path)
    assert not blobs.lend("scope", digest, tmp_path / "none")
    blobs.keep("scope", other, handle)
    assert not list(kept.rglob("*")), "a file that is not what its digest says"
    blobs.keep("scope", digest, handle)
    blobs.keep("scope", digest, handle)
    assert not blobs.lend("elsewhere", digest, tmp_path / "none")
    assert not blobs.lend("scope", "../scope", tmp_path / "none")
    assert blobs.lend("scope", digest, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"content"
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o444
    (file,) = kept.glob("scope/*")
    file.chmod(0o644)
    file.write_bytes(b"changed")
    assert not blobs.lend("scope", digest, tmp_path / "none")
    assert not file.exists()
    assert not (tmp_path / "none").exists()


@pytest.mark.root
def test_the_least_recently_used_blobs_go_first(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    blobs = Blobs(kept, 100_000)
    digests = []
    for number in range(3):
        digest, handle = blob(bytes([number]) * 40_000, tmp_path)
        blobs.keep(f"scope{number}", digest, handle)
        os.close(handle)
        digests.append(digest)
        if number == 1:
            for age, each in enumerate(kept.glob("*/*")):
                os.utime(each, (age, age))
            assert blobs.lend("scope0", digests[0], tmp_path / "used")
    assert blobs.lend("scope0", digests[0], tmp_path / "first")
    assert not blobs.lend("scope1", digests[1], tmp_path / "second")
    assert blobs.lend("scope2", digests[2], tmp_path / "third")
    assert sorted(each.name for each in kept.iterdir()) == ["scope0", "scope2"]
