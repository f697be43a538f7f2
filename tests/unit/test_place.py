"""Where sandboxes are served, as flags, environment and stored login say it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandmartin.cli import parse
from sandmartin.cli.connection import place_of
from sandmartin.client.ports import name_of
from sandmartin.errors import Invalid
from sandmartin.transport.agent import AgentSocket
from sandmartin.transport.login import (
    Login,
    forget_login,
    login_file,
    store_login,
    stored_login,
)
from sandmartin.transport.place import Place, find_place

_STORED = Login(url="https://stored.example", api_key="e2b_stored", key_id="k1")


def environment(config: Path, **names: str) -> dict[str, str]:
    return {"XDG_CONFIG_HOME": str(config)} | {
        f"SANDMARTIN_{name.upper()}": value for name, value in names.items()
    }


def test_flags_come_before_the_environment_and_that_before_the_login(tmp_path: Path) -> None:
    none = environment(tmp_path, data_dir="/srv/sm")
    assert find_place(environ=none) == Place(socket=Path("/srv/sm/agent.sock"))
    store_login(login_file(none), _STORED)
    assert find_place(environ=none) == Place("https://stored.example", "e2b_stored")
    both = environment(tmp_path, url="http://other:8000", api_key="e2b_other")
    assert find_place(environ=both) == Place("http://other:8000", "e2b_other")
    assert find_place("http://third", "e2b_third", both) == Place("http://third", "e2b_third")
    own_key = environment(tmp_path, api_key="e2b_mine")
    assert find_place(environ=own_key) == Place("https://stored.example", "e2b_mine")
    same = environment(tmp_path, url="https://stored.example/")
    assert find_place(environ=same).api_key == "e2b_stored"
    socket = environment(tmp_path, url="unix:/srv/agent.sock")
    assert find_place(environ=socket) == Place(socket=Path("/srv/agent.sock"))
    assert isinstance(find_place(environ=socket).transport(), AgentSocket)
    forget_login(login_file(none))
    forget_login(login_file(none))
    assert find_place(environ=none).socket == Path("/srv/sm/agent.sock")


def test_a_stored_key_goes_nowhere_else(tmp_path: Path) -> None:
    elsewhere = environment(tmp_path, url="https://elsewhere.example")
    store_login(login_file(elsewhere), _STORED)
    with pytest.raises(Invalid, match=r"no API key for https://elsewhere\.example") as raised:
        find_place(environ=elsewhere)
    assert raised.value.hint.endswith("sandmartin login https://elsewhere.example")
    assert "e2b_stored" not in repr(find_place(environ=environment(tmp_path)))
    assert "e2b_stored" not in repr(_STORED)


def test_a_key_without_a_url_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="SANDMARTIN_URL"):
        find_place(environ=environment(tmp_path, api_key="e2b_mine"))


def test_a_login_is_its_users_alone(tmp_path: Path) -> None:
    file = tmp_path / "new" / "sandmartin" / "login.json"
    store_login(file, _STORED)
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    file.chmod(0o644)
    store_login(file, _STORED)
    assert file.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in file.parent.iterdir()] == ["login.json"]
    assert stored_login(file) == _STORED
    for content in ('["e2b_secret"]', '{"url": "e2b_secret"', '{"e2b_secret": 1}', "e2b_secret"):
        file.write_text(content)
        with pytest.raises(Invalid, match="holds no login") as raised:
            stored_login(file)
        assert "e2b_secret" not in f"{raised.value}{raised.value.hint}"
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    with pytest.raises(Invalid, match="cannot be written"):
        store_login(in_the_way / "login.json", _STORED)
    assert stored_login(in_the_way / "login.json") is None


def test_a_flag_for_the_agent_means_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANDMARTIN_URL", "http://127.0.0.1:8000")
    monkeypatch.setenv("SANDMARTIN_API_KEY", "e2b_key")
    assert place_of(parse(["ls"])) == Place("http://127.0.0.1:8000", "e2b_key")
    assert place_of(parse(["ls", "--server", "http://b"])) == Place("http://b", "e2b_key")
    agent = Place(socket=tmp_path / "agent.sock")
    assert place_of(parse(["ls", "--data-dir", str(tmp_path)])) == agent
    local = ["run", "--data-dir", str(tmp_path), "--accel", "tcg", "--", "true"]
    assert place_of(parse(local)) == agent
    with pytest.raises(Invalid, match="--server"):
        place_of(parse(["ls", "--server", "http://b", "--data-dir", str(tmp_path)]))


@pytest.mark.parametrize(
    ("server", "domain", "url"),
    [
        ("http://127.0.0.1:8000", "", "http://3000-sb1.localhost:8000"),
        ("http://[::1]:8000", "", "http://3000-sb1.localhost:8000"),
        ("https://sm.example", "", "https://3000-sb1.sm.example"),
        ("https://sm.example:8443", "box.example", "https://3000-sb1.box.example:8443"),
        ("https://sm.example", "box.example:9000", "https://3000-sb1.box.example:9000"),
    ],
)
def test_a_ports_name(server: str, domain: str, url: str) -> None:
    assert name_of(server, domain, "sb1", 3000) == url


def test_an_address_has_no_names_below_it() -> None:
    with pytest.raises(Invalid, match=r"10\.0\.0\.7"):
        name_of("http://10.0.0.7:8000", "", "sb1", 3000)
