"""`sandmartin host` as far as it goes without a control plane; with one it is in the e2e tests."""

from __future__ import annotations

import socket

import pytest

from sandmartin.cli import main

_KEY = "e2b_" + "5" * 40


def test_it_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SANDMARTIN_URL", raising=False)
    monkeypatch.setenv("SANDMARTIN_API_KEY", _KEY)
    assert main(["host", "ls"]) == 1
    out, err = capsys.readouterr()
    assert not out and "SANDMARTIN_URL" in err and "hint:" in err


def test_a_control_plane_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        # Bound and not listening: nobody else takes the port, and nobody answers.
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("SANDMARTIN_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("SANDMARTIN_API_KEY", _KEY)
        assert main(["host", "add", "alpha"]) == 1
    out, err = capsys.readouterr()
    assert not out and "cannot be reached" in err and _KEY not in err


@pytest.mark.parametrize("words", ["host", "host add", "host rm", "host drain", "host ls x"])
def test_wrong_usage(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    assert "\nhint: sandmartin" in capsys.readouterr().err
