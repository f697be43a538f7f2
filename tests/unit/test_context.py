"""Build contexts: packed from real directories, read from hostile archives, chosen from by COPY."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import socket
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandmartin.context.archive import Limits, open_archive
from sandmartin.context.directory import pack_directory, read_ignore_rules
from sandmartin.context.source import InvalidBuild
from sandmartin.context.tree import Entry, Kind, Selection, Tree

_FILES = {"a.txt": b"one", "d/b.txt": b"two", "d/e/c.sh": b"#!/bin/sh\n", "z": b""}


def _make(root: Path, files: dict[str, bytes] = _FILES) -> Path:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def _packed(root: Path, *, compress: bool = True) -> bytes:
    out = io.BytesIO()
    pack_directory(root, out, read_ignore_rules(root), compress=compress)
    return out.getvalue()


def _read(content: bytes, limits: Limits | None = None) -> Tree:
    with open_archive(io.BytesIO(content), limits) as archive:
        return archive.tree


def _member(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", to: str = "") -> bytes:
    """One member, by the library's own means."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size, info.mode = kind, to, len(content), 0o644
        tar.addfile(info, io.BytesIO(content))
        length = tar.offset
    return out.getvalue()[:length]


def _tar(*members: bytes) -> bytes:
    return b"".join(members) + bytes(1024)


def test_the_same_files_are_the_same_bytes(tmp_path: Path) -> None:
    one = _make(tmp_path / "one")
    two = _make(tmp_path / "two", dict(reversed(_FILES.items())))
    os.utime(two / "a.txt", (1, 1))
    os.chown(two / "z", os.getuid(), os.getgid())
    assert _packed(one) == _packed(two)
    (two / "a.txt").chmod(0o600)
    assert _packed(one) != _packed(two)


@pytest.mark.parametrize("compress", [True, False])
def test_what_is_packed_is_what_is_read(tmp_path: Path, compress: bool) -> None:
    root = _make(tmp_path)
    (root / "link").symlink_to("d/b.txt")
    (root / "empty").mkdir(mode=0o700)
    (root / "d/e/c.sh").chmod(0o755)
    with open_archive(io.BytesIO(_packed(root, compress=compress))) as archive:
        entries = archive.tree.entries
        assert {path for path, entry in entries.items() if entry.kind is Kind.FILE} == set(_FILES)
        for path, content in _FILES.items():
            with archive.open(path) as file:
                assert file.read() == content
        assert entries["link"].target == "d/b.txt"
        assert entries["empty"].mode == 0o700
        assert entries["d/e/c.sh"].mode == 0o755
        plain = io.BytesIO()
        archive.write(plain)
    assert plain.getvalue() == _packed(root, compress=False)


def test_what_is_ignored_stays_out(tmp_path: Path) -> None:
    root = _make(tmp_path, {**_FILES, ".dockerignore": b"d\n!d/e\n.dockerignore\n"})
    assert set(_read(_packed(root)).entries) == {"a.txt", "d", "d/e", "d/e/c.sh", "z"}
    (root / "Dockerfile.dockerignore").write_text("*\n!z\n")
    assert set(_read(_packed(root)).entries) == {"z"}


def test_links_are_not_followed_and_devices_left_out(tmp_path: Path) -> None:
    outside = _make(tmp_path / "outside")
    root = _make(tmp_path / "root")
    (root / "out").symlink_to(outside)
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fspath(root / "sock"))
        found = _read(_packed(root)).entries
    assert found["out"].kind is Kind.LINK
    assert not {"pipe", "sock", "out/a.txt"} & set(found)


def test_what_cannot_be_packed_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidBuild, match="no directory"):
        _packed(tmp_path / "none")
    root = _make(tmp_path)
    for limits, what in ((Limits(size_bytes=5), "bytes"), (Limits(count=2), "members")):
        with pytest.raises(InvalidBuild, match=f"more than . {what}|more than 5"):
            pack_directory(root, io.BytesIO(), limits=limits)


@pytest.mark.parametrize(
    ("member", "why"),
    [
        (_member("../x"), "'../x' of the archive is refused: its path climbs out"),
        (_member("a/../../x"), "climbs out"),
        (_member("/etc/passwd"), "absolute"),
        (_member("x" * 300), "too long"),
        (_member("a/" * 2500 + "x"), "too long"),
        (_member("pipe", tarfile.FIFOTYPE), "'pipe' .* neither a file"),
        (_member("null", tarfile.CHRTYPE), "neither a file"),
        (_member("sda", tarfile.BLKTYPE), "neither a file"),
        (_member("h", tarfile.LNKTYPE, to="/etc/shadow"), "no file before it"),
        (_member("h", tarfile.LNKTYPE, to="../x"), "no file before it"),
        (_member("l", tarfile.SYMTYPE, to=""), "no path"),
        (_member("s", tarfile.SYMTYPE, to="/etc") + _member("s/x"), "below 's', which is a link"),
        (_member("s/x") + _member("s", tarfile.SYMTYPE, to="/etc"), "below 's', which is a link"),
        (_member("f") + _member("f/x"), "below 'f', which is a file"),
        (_member("."), "no name"),
        (_member("bad\udcff"), "UTF-8"),
    ],
)
def test_a_hostile_member_is_refused_by_name(member: bytes, why: str) -> None:
    archive = _tar(_member("first", content=b"1"), member)
    for content in (archive, gzip.compress(archive)):
        with pytest.raises(InvalidBuild, match=why):
            _read(content)


def test_bombs_are_refused_before_they_are_held() -> None:
    big = bytes(2**20)
    many = _tar(*(_member(f"f{number}") for number in range(30)))
    for content, limits in (
        (_tar(_member("big", content=big)), Limits(size_bytes=2**19)),
        (gzip.compress(_tar(_member("big", content=big))), Limits(size_bytes=2**19, count=10)),
        (gzip.compress(bytes(2**24)), Limits(size_bytes=2**20, count=10)),
        (many, Limits(count=20)),
        (_zip({"big": big}), Limits(size_bytes=2**19)),
        (_zip({f"f{number}": b"" for number in range(30)}), Limits(count=20)),
    ):
        with pytest.raises(InvalidBuild, match="more than"):
            _read(content, limits)
    # As many links to one large file count as often.
    links = _tar(
        _member("a", content=big), *(_member(f"l{n}", tarfile.LNKTYPE, to="a") for n in range(9))
    )
    with pytest.raises(InvalidBuild, match="more than"):
        _read(links, Limits(size_bytes=2**22))
    # Directories that nobody named count, too.
    with pytest.raises(InvalidBuild, match="more than"):
        _read(_tar(_member("a/b/c/d/e/f/g")), Limits(count=5))


def test_a_header_without_end_is_refused() -> None:
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 2**33
    with pytest.raises(InvalidBuild, match="header that is too long"):
        _read(header.tobuf(tarfile.GNU_FORMAT) + bytes(2**20))


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\xff" * 11 + b"\x00", b"-0000000001\0"])
def test_a_negative_size_is_no_way_back(size: bytes) -> None:
    raw = bytearray(_tar(_member("a", content=b"x" * 600)))
    raw[124:136] = size
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    with pytest.raises(InvalidBuild):
        _read(bytes(raw))


def _zip(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
    return out.getvalue()


def _zip_of(info: zipfile.ZipInfo, content: bytes = b"x") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as zipped:
        zipped.writestr(info, content)
    return out.getvalue()


def _zip_info(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def test_a_zip_is_the_same_tree_as_a_tar(tmp_path: Path) -> None:
    root = _make(tmp_path)
    zipped = _zip(_FILES)
    with open_archive(io.BytesIO(zipped)) as archive:
        assert archive.tree.entries["d/b.txt"].sha256 == (
            _read(_packed(root)).entries["d/b.txt"].sha256
        )
        with archive.open("d/b.txt") as file:
            assert file.read() == b"two"
    link = _read(_zip_of(_zip_info("l", stat.S_IFLNK | 0o777), b"/etc/passwd")).entries["l"]
    assert (link.kind, link.target) == (Kind.LINK, "/etc/passwd")
    assert _read(_zip_of(_zip_info("x", stat.S_IFREG | 0o755))).entries["x"].mode == 0o755


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (_zip({"../x": b"1"}), "climbs out"),
        (_zip({"/x": b"1"}), "absolute"),
        (_zip({"x": b"1"}, zipfile.ZIP_BZIP2), "not supported"),
        (_zip_of(_zip_info("p", stat.S_IFIFO | 0o644)), "neither a file"),
        (_zip({"x": b"1" * 1000})[:-30], "damaged"),
        (b"PK", "damaged"),
        (b"", "damaged"),
        (b"no archive at all" * 100, "damaged"),
        (gzip.compress(_tar(_member("a")))[:-9], "damaged"),
        (_tar(_member("a", content=b"x" * 2000))[:1500], "as long as it says|damaged"),
    ],
    ids=lambda each: each if isinstance(each, str) else f"{len(each)} bytes",
)
def test_a_bad_archive_is_refused(content: bytes, why: str) -> None:
    with pytest.raises(InvalidBuild, match=why):
        _read(content)


def test_an_encrypted_zip_is_refused() -> None:
    content = bytearray(_zip({"x": b"1"}))
    at = content.find(b"PK\x01\x02")
    content[at + 8] |= 1
    with pytest.raises(InvalidBuild, match="encrypted"):
        _read(bytes(content))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_is_broken_is_refused_or_read(data: st.DataObject) -> None:
    base = data.draw(
        st.sampled_from(
            [
                _tar(_member("a", content=b"x" * 700), _member("ä" * 90), _member("d/b")),
                gzip.compress(_tar(_member("a", content=b"x" * 700)), mtime=0),
                _zip({"a": b"x" * 700, "d/b": b"y"}),
            ]
        )
    )
    content = bytearray(base)
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    try:
        tree = _read(bytes(content), Limits(size_bytes=2**20, count=100))
    except InvalidBuild:
        return
    assert all(not path.startswith("/") and ".." not in path.split("/") for path in tree.entries)


# The child.


_NOBODY = 65534
_AS_NOBODY = [f"--uid={_NOBODY}"] if os.geteuid() == 0 else []


def _child(content: bytes, *options: str) -> subprocess.CompletedProcess[bytes]:
    with open(os.memfd_create("archive"), "w+b") as file:  # noqa: PTH123
        file.write(content)
        file.seek(0)
        return subprocess.run(
            [sys.executable, "-m", "sandmartin.context", *_AS_NOBODY, *options],
            stdin=file,
            capture_output=True,
            check=False,
            env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )


def test_a_child_without_rights_makes_an_archive_plain(tmp_path: Path) -> None:
    root = _make(tmp_path)
    done = _child(_packed(root))
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == _packed(root, compress=False)


def test_a_child_refuses_in_one_object() -> None:
    done = _child(_tar(_member("../x")))
    assert done.returncode == 2
    assert "climbs out" in json.loads(done.stderr)["message"]
    done = _child(gzip.compress(bytes(2**24)), "--size-bytes=1000", "--count=1")
    assert "more than 1000 bytes" in json.loads(done.stderr)["message"]


def test_a_zip_with_old_names_is_read_without_rights() -> None:
    content = _zip({"caf_": b"1"}).replace(b"caf_", b"caf\x82")
    done = _child(content)
    assert done.returncode == 0, done.stderr
    assert set(_read(done.stdout).entries) == {"café"}


@pytest.mark.root
def test_rights_do_not_come_back() -> None:
    script = (
        "import os; from sandmartin.context.__main__ import become; become(65534);"
        "print(os.getresuid(), os.getresgid(), os.getgroups()); os.setuid(0)"
    )
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=False, env={"PYTHONPATH": path}
    )
    assert done.stdout.decode().strip() == f"{(_NOBODY,) * 3} {(_NOBODY,) * 3} []"
    assert b"PermissionError" in done.stderr


# What a COPY takes.


@pytest.fixture
def tree() -> Tree:
    return _read(
        _tar(
            _member("a.txt", content=b"a"),
            _member("b.txt", content=b"b"),
            _member("app.tar.gz", content=b"t"),
            _member("src/main.py", content=b"m"),
            _member("src/lib/x.py", content=b"x"),
            _member("two/main.py", content=b"2"),
            _member("clash/lib", content=b"c"),
            _member("to-src", tarfile.SYMTYPE, to="src/lib"),
            _member("up", tarfile.SYMTYPE, to="../../../a.txt"),
            _member("abs", tarfile.SYMTYPE, to="/src"),
            _member("loop", tarfile.SYMTYPE, to="loop"),
            _member("odd[1].txt", content=b"o"),
        )
    )


def _to(selection: Selection) -> list[str]:
    return [each.to for each in selection.taken]


@pytest.mark.parametrize(
    ("sources", "to", "needs_directory"),
    [
        (["a.txt"], ["a.txt"], False),
        (["./src/../a.txt"], ["a.txt"], False),
        (["../../a.txt"], ["a.txt"], False),
        (["src"], ["lib", "lib/x.py", "main.py"], True),
        (["src/"], ["lib", "lib/x.py", "main.py"], True),
        (["?.txt"], ["a.txt", "b.txt"], True),
        (["src/*.py"], ["main.py"], False),
        (["*/main.py"], ["main.py"], True),
        (["odd[1].txt"], ["odd[1].txt"], False),
        (["to-src"], ["x.py"], True),
        (["to-src/x.py"], ["x.py"], False),
        (["up"], ["up"], False),
        (["abs/main.py"], ["main.py"], False),
    ],
)
def test_selection(tree: Tree, sources: list[str], to: list[str], needs_directory: bool) -> None:
    selection = tree.select(sources)
    assert (_to(selection), selection.needs_directory) == (to, needs_directory)


def test_the_later_of_two_files_wins(tree: Tree) -> None:
    (first,) = [t for t in tree.select(["src", "two"]).taken if t.to == "main.py"]
    (second,) = [t for t in tree.select(["two", "src"]).taken if t.to == "main.py"]
    assert (first.path, second.path) == ("two/main.py", "src/main.py")


def test_the_whole_context(tree: Tree) -> None:
    assert {"a.txt", "src", "src/lib/x.py", "loop"} <= set(_to(tree.select(["."])))


@pytest.mark.parametrize(
    ("sources", "why"),
    [
        (["none"], "the context has no 'none'"),
        (["*.none"], "has no"),
        (["loop"], "has no 'loop'"),
        (["a.txt/x"], "has no"),
        (["[z"], "malformed"),
        (["src", "clash"], "disagree whether 'lib' is a directory"),
    ],
)
def test_what_cannot_be_taken(tree: Tree, sources: list[str], why: str) -> None:
    with pytest.raises(InvalidBuild, match=why):
        tree.select(sources)


def test_what_is_taken_is_written(tmp_path: Path) -> None:
    root = _make(tmp_path)
    with open_archive(io.BytesIO(_packed(root))) as archive:
        out = io.BytesIO()
        archive.write_selection(archive.tree.select(["d", "a.txt"]), out)
        with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
            assert tar.getnames() == ["a.txt", "b.txt", "e", "e/c.sh"]
            file = tar.extractfile("b.txt")
            assert file is not None
            assert file.read() == b"two"
        out = io.BytesIO()
        archive.write_selection(archive.tree.select(["a.txt"]), out, name="other")
        assert set(_read(out.getvalue()).entries) == {"other"}
        with pytest.raises(ValueError, match="single file"):
            archive.write_selection(archive.tree.select(["d"]), out, name="other")


def test_many_patterns_on_many_files_are_refused() -> None:
    tree = Tree({f"{number:0200}": Entry(Kind.FILE, 0o644) for number in range(5000)})
    assert len(tree.select(["*1"]).taken) == 500
    with pytest.raises(InvalidBuild, match="too many patterns"):
        tree.select(["*1"] * 10_000)


def test_add_meets_no_archive(tree: Tree) -> None:
    assert _to(tree.select(["app.tar.gz"])) == ["app.tar.gz"]
    with pytest.raises(InvalidBuild, match=r"ADD does not unpack 'app\.tar\.gz'"):
        tree.select(["*.gz"], archives=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda files: files | {"src/main.py": b"other"},
        lambda files: files | {"src/more": b""},
        lambda files: {k: v for k, v in files.items() if k != "src/x/y"},
    ],
)
def test_the_digest_changes_with_the_files(
    tmp_path: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]]
) -> None:
    files = {"src/main.py": b"m", "src/x/y": b"y", "beside": b"b"}
    before = _read(_packed(_make(tmp_path / "1", files))).select(["src"]).digest
    same = _read(_packed(_make(tmp_path / "2", files | {"beside": b"2"}))).select(["src"]).digest
    after = _read(_packed(_make(tmp_path / "3", change(files)))).select(["src"]).digest
    assert before == same != after


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.lists(st.text("abé. -", min_size=1, max_size=5), min_size=1, max_size=3).map(tuple),
        st.binary(max_size=40),
        max_size=8,
    ),
    st.randoms(),
)
def test_order_never_matters(found: dict[tuple[str, ...], bytes], order: random.Random) -> None:
    parts = {key for key in found if not {".", ".."} & set(key)}
    files = {
        "/".join(key): found[key]
        for key in parts
        if not any(other != key and other[: len(key)] == key for other in parts)
    }
    shuffled = list(files)
    order.shuffle(shuffled)
    members = {name: _member(name, content=files[name]) for name in files}
    one = _read(_tar(*(members[name] for name in files))) if files else Tree({})
    two = _read(_tar(*(members[name] for name in shuffled))) if files else Tree({})
    assert one.select(["."]).digest == two.select(["."]).digest
