"""What the doctor makes of a machine. What only root can try is tried when root runs the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from sandmartin.agent.doctor import Finding, examine
from sandmartin.model import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Nothing is set up, so that no VM is booted."""
    return Settings(data_dir=tmp_path / "not" / "there", assets_dir=tmp_path / "assets")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return Tools(directory)


class Tools:
    """Programs of the host, replaced by what they would say on another host."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def script(self, name: str, body: str) -> None:
        path = self._directory / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def nft(self, chains: list[dict[str, Any]], rules: list[list[dict[str, Any]]]) -> None:
        """What `nft -j` lists: all chains, and the rules of whichever table is asked for."""
        listed = {"chains": [{"chain": chain} for chain in chains]}
        listed["table"] = [{"rule": {"expr": expr}} for expr in rules]
        listed["tables"] = []
        head: dict[str, Any] = {"metainfo": {"version": "1.0.6"}}
        for kind, objects in listed.items():
            content = json.dumps({"nftables": [head, *objects]})
            (self._directory / f"{kind}.json").write_text(content)
        self.script("nft", f'[ "$1" = -j ] && cat "{self._directory}/$3.json"')


async def find(name: str, settings: Settings) -> Finding:
    (finding,) = (each for each in await examine(settings) if each.name == name)
    return finding


def forward(table: str, name: str, policy: str, family: str = "ip") -> dict[str, Any]:
    kind = {"type": "filter", "hook": "forward", "prio": 0, "policy": policy}
    return {"family": family, "table": table, "name": name, "handle": 1, **kind}


def plain(table: str, name: str) -> dict[str, Any]:
    return {"family": "ip", "table": table, "name": name, "handle": 2}


def link(
    key: str, verdict: str = "accept", name: str = "sm*", op: str = "=="
) -> list[dict[str, Any]]:
    match = {"op": op, "left": {"meta": {"key": key}}, "right": name}
    return [{"match": match}, {"counter": {"packets": 0, "bytes": 0}}, {verdict: None}]


DOCKER = [forward("filter", "FORWARD", "drop"), plain("filter", "DOCKER-USER")]
UFW = [forward("filter", "FORWARD", "drop"), plain("filter", "ufw-before-forward")]
FIREWALLD = [forward("firewalld", "filter_FORWARD", "accept", "inet")]
OTHER = [forward("mine", "fw", "drop", "inet")]


# Everything at once.


async def test_every_check_answers_and_every_failure_has_a_remedy(settings: Settings) -> None:
    findings = await examine(settings)
    assert len({finding.name for finding in findings}) == len(findings) >= 14
    for finding in findings:
        assert finding.detail
        assert "\n" not in finding.detail
        assert finding.ok or finding.remedy
        assert "broke" not in finding.detail
    found = {finding.name: finding for finding in findings}
    for name in ("assets", "accelerator"):
        assert not found[name].ok
        assert "sandmartin setup" in found[name].remedy
    assert os.geteuid() == 0 or not found["rights"].ok
    assert not settings.data_dir.exists()
    assert not list(Path("/sys/fs/cgroup").glob("**/sandmartin-doctor-*"))


def test_the_verb_prints_findings_and_exits_1(settings: Settings) -> None:
    argv = [
        sys.executable,
        "-m",
        "sandmartin",
        "doctor",
        "--data-dir",
        os.fspath(settings.data_dir),
    ]
    env = os.environ | {"SANDMARTIN_ASSETS_DIR": os.fspath(settings.assets_dir)}

    def doctor(*words: str) -> subprocess.CompletedProcess[str]:
        limited = ["sh", "-c", 'ulimit -n 256; exec "$@"', "sh", *argv, *words]
        return subprocess.run(limited, env=env, capture_output=True, text=True, timeout=60)

    done = doctor("--json")
    found = {each["name"]: each for each in json.loads(done.stdout)}
    assert (done.returncode, done.stderr) == (1, "")
    assert found["descriptors"]["ok"] is False
    assert "ulimit" in found["descriptors"]["remedy"]
    done = doctor()
    assert done.returncode == 1
    assert "\nFAIL  assets " in done.stdout
    assert " -> run `sandmartin setup` as root\n" in done.stdout


async def test_too_little_of_anything_is_found(settings: Settings) -> None:
    findings = await examine(replace(settings, disk_floor_mb=2**40, memory_reserve_mb=2**40))
    failed = {finding.name for finding in findings if not finding.ok}
    assert {"disk", "memory"} <= failed
    assert not {"disk", "memory"} & {f.name for f in await examine(settings) if not f.ok}


# Firewalls.


@pytest.mark.parametrize(
    ("chains", "rules", "remedy"),
    [
        (DOCKER, [], "iptables -I DOCKER-USER -i sm+"),
        (DOCKER, [link("iifname")], "iptables -I DOCKER-USER"),
        (DOCKER, [link("iifname"), link("oifname", "drop")], "iptables -I DOCKER-USER"),
        (DOCKER, [link("iifname"), link("oifname", name="docker0")], "iptables -I DOCKER-USER"),
        (DOCKER, [link("iifname"), link("oifname", op="!=")], "iptables -I DOCKER-USER"),
        (UFW, [], "ufw route allow in on sm+"),
        (FIREWALLD, [], "firewall-cmd --permanent --zone=trusted --add-interface=sm+"),
        (OTHER, [], "nft insert rule inet mine fw iifname '\"sm*\"' accept && nft insert rule"),
        ([forward("mine", "fw", "accept"), *OTHER], [], "nft insert rule inet mine fw"),
    ],
)
async def test_a_firewall_that_drops_what_sandboxes_send_is_found(
    settings: Settings,
    tools: Tools,
    chains: list[dict[str, Any]],
    rules: list[list[dict[str, Any]]],
    remedy: str,
) -> None:
    tools.nft(chains, rules)
    finding = await find("forwarding", settings)
    assert not finding.ok
    assert "drops forwarded packets" in finding.detail
    assert finding.remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("chains", "rules"),
    [
        ([], []),
        (DOCKER, [link("iifname"), link("oifname")]),
        (UFW, [link("iifname")]),
        (FIREWALLD, [link("iifname", "goto")]),
        (OTHER, [link("iifname"), link("oifname")]),
        ([forward("filter", "FORWARD", "accept")], []),
        ([forward("filter", "FORWARD", "drop", "ip6")], []),
        # Another agent's.
        ([forward("sandmartin-abc", "forward", "drop", "inet")], []),
        ([forward("mine", "input", "drop") | {"hook": "input"}], []),
    ],
)
async def test_a_firewall_that_lets_sandboxes_through_is_fine(
    settings: Settings,
    tools: Tools,
    chains: list[dict[str, Any]],
    rules: list[list[dict[str, Any]]],
) -> None:
    tools.nft(chains, rules)
    finding = await find("forwarding", settings)
    assert finding.ok, finding


# Routes.


@pytest.mark.parametrize(
    ("route", "setting"),
    [
        ({"dst": "10.11.4.0/24", "dev": "eth0"}, "SANDMARTIN_ADDRESS_RANGE"),
        ({"dst": "10.0.0.0/8", "dev": "wg0", "table": "51820"}, "SANDMARTIN_ADDRESS_RANGE"),
        ({"dst": "10.13.1.1", "nexthops": [{"dev": "eth0"}]}, "SANDMARTIN_LINK_RANGE"),
        ({"type": "blackhole", "dst": "10.12.0.0/16"}, "SANDMARTIN_LINK_RANGE"),
        ({"dst": "default", "dev": "eth0"}, None),
        ({"dst": "0.0.0.0/1", "dev": "tun0"}, None),
        ({"dst": "10.14.0.0/16", "dev": "eth0"}, None),
        ({"dst": "10.11.0.1", "dev": "smabc123-0"}, None),
    ],
)
async def test_a_route_that_takes_our_addresses_is_found(
    settings: Settings, tools: Tools, route: dict[str, Any], setting: str | None
) -> None:
    tools.script("ip", f"echo '{json.dumps([{'dst': 'default', 'dev': 'eth0'}, route])}'")
    finding = await find("routes", settings)
    assert finding.ok == (setting is None)
    if setting is not None:
        assert route["dst"] in finding.detail
        assert setting in finding.remedy


async def test_other_ranges_than_the_default_are_what_is_compared(
    settings: Settings, tools: Tools
) -> None:
    tools.script("ip", """echo '[{"dst":"10.11.0.0/16","dev":"eth0"}]'""")
    moved = replace(settings, address_range=IPv4Network("172.20.0.0/16"))
    assert (await find("routes", moved)).ok


# What is not needed by all.


@pytest.mark.root
def test_without_cells_sandboxes_run_all_the_same(settings: Settings, tmp_path: Path) -> None:
    # In a chroot there are no user namespaces.
    chroot = 'mount --rbind / "$1" && exec chroot "$@"'
    argv = ["unshare", "--mount", "--propagation=private", "sh", "-c", chroot, "sh"]
    doctor = [sys.executable, "-m", "sandmartin", "doctor", "--data-dir"]
    argv += [os.fspath(tmp_path), *doctor, os.fspath(settings.data_dir)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    (line,) = (each for each in done.stdout.splitlines() if "  cells  " in each)
    assert line.startswith("warn  cells") and "image" in line
    assert "chroot" in done.stdout
    ended = 1 if "\nFAIL" in f"\n{done.stdout}" else 0
    assert done.returncode == ended


# Checks that cannot be made.


@pytest.mark.parametrize(
    "body",
    [
        "echo '{'",
        "echo '[{}]'",
        """echo '{"nftables": [{"chain": {"hook": "forward"}}]}'""",
        "exit 3",
        "kill -9 $$",
    ],
)
async def test_a_check_that_breaks_is_a_finding(
    settings: Settings, tools: Tools, body: str
) -> None:
    for name in ("nft", "ip", "unshare", "qemu-system-x86_64"):
        tools.script(name, body)
    findings = {finding.name: finding for finding in await examine(settings)}
    for name in ("forwarding", "routes", "qemu"):
        assert not findings[name].ok, name
        assert findings[name].remedy
        assert "\n" not in findings[name].detail
    assert findings["disk"].ok
