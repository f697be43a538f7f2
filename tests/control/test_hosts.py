"""Hosts join, are lost, come back, and go: real agents over mutual TLS on loopback."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from sqlalchemy import select, update

from sandmartin.agent.membership import NO_WISH, Wish
from sandmartin.control import tables
from sandmartin.control.hosts import check_address
from sandmartin.errors import Invalid, Unauthenticated, Unavailable
from tests.control.conftest import client_of, make_team
from tests.control.members import Served, joined, member, served_platform, until, wish
from tests.fakes_agent import find_vms, machine_directory

NEW = {"memory_mb": 128, "disk_size_mb": 8}
FACTS = {
    "cpus": 2,
    "memory_mb": 1000,
    "memory_overhead_mb": 1,
    "disk_free_mb": 9000,
    "cpu_overcommit": 2.0,
    "accel": "tcg",
    "vmm_version": "1",
    "agent_version": "1",
}
ADDRESS = "https://127.0.0.1:7443"
#: What does not depend on the kind of database.
on_one = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
async def served(database_url: str, tmp_path: Path) -> AsyncIterator[Served]:
    async with served_platform(database_url, tmp_path) as served:
        yield served


async def create(served: Served) -> str:
    made = await served.ask("POST", "/v1/sandboxes", 201, json=NEW)
    return str(made["id"])


async def status(served: Served, sandbox_id: str) -> str:
    return str((await served.ask("GET", f"/v1/sandboxes/{sandbox_id}"))["status"])


def request_of(key: Any = None) -> str:
    key = key or ec.generate_private_key(ec.SECP256R1())
    made = x509.CertificateSigningRequestBuilder(x509.Name([])).sign(key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM).decode()


def registration(token: str, **more: Any) -> dict[str, Any]:
    content = {"token": token, "request": request_of(), "address": ADDRESS, "facts": FACTS}
    return {**content, **more}


async def audit_of(served: Served) -> list[tuple[str, str]]:
    record = tables.AuditRecord
    query = select(record.actor_kind, record.action).where(record.resource_kind == "host")
    async with served.platform.db.read() as session:
        found = await session.execute(query.order_by(record.audit_id))
        return [(kind, action) for kind, action in found]


async def test_a_machine_becomes_a_host(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "sandmartin")
    host_id, token = await served.add("alpha")
    with machine_directory() as directory:
        async with member(directory, wish(served, token)) as agent:
            host = await served.host(host_id)
            assert host["address"] == agent.address
            about = agent.fakes.machine
            assert host["cpu_overcommit"] == about.settings.cpu_overcommit
            assert host["cpus"] > 0 and host["memory_mb"] > 0 and host["accel"] == "tcg"
            await served.platform.reconciler.tick()
            sandbox_id = await create(served)
            assert (await served.host(host_id))["running"] == 1
            again = await served.http.post("/v1/hosts/register", json=registration(token))
            assert (again.status_code, again.json()["error"]["code"]) == (401, "unauthenticated")
        kept = directory / "data/membership.json"
        assert kept.stat().st_mode & 0o777 == 0o600
        # A restart needs no token, and finds what runs; the port is another one.
        async with member(directory) as agent:
            await until(lambda: _is_at(served, host_id, agent.address))
            # It may have been missed meanwhile.
            await until(lambda: _has(served, sandbox_id, "running"))
            await served.ask("POST", f"/v1/sandboxes/{sandbox_id}/pause")
            await served.ask("POST", f"/v1/sandboxes/{sandbox_id}/resume")
            assert (await served.host(host_id))["running"] == 1
        content = json.loads(kept.read_bytes())
        for secret in (token, content["token"], content["key"].splitlines()[1]):
            assert secret not in caplog.text
    assert await audit_of(served) == [
        ("key", "host.created"),
        ("host", "host.registered"),
        ("host", "host.moved"),
    ]


async def _is_at(served: Served, host_id: str, address: str) -> bool:
    return bool((await served.host(host_id))["address"] == address)


async def test_a_lost_host_comes_back(served: Served) -> None:
    host_id, token = await served.add("alpha")
    with machine_directory() as directory:
        async with member(directory, wish(served, token)):
            await served.platform.reconciler.tick()
            running, paused = await create(served), await create(served)
            await served.ask("POST", f"/v1/sandboxes/{paused}/pause")
        await until(lambda: _has(served, running, "missing"))
        assert (await served.host(host_id))["status"] == "unreachable"
        assert await status(served, paused) == "paused"
        refused = await served.http.post("/v1/sandboxes", json=NEW)
        assert refused.status_code == 503
        async with member(directory):
            await until(lambda: _has(served, running, "running"))
            assert (await served.host(host_id))["status"] == "online"
            await served.ask("POST", f"/v1/sandboxes/{paused}/resume")
    kinds = [each.kind for each in await served.platform.events.since(0)]
    changes = [each for each in kinds if each in {"host.down", "host.up"}]
    # It ends at the end of the test, which may be seen as well.
    assert changes[:2] == ["host.down", "host.up"]


async def _has(served: Served, sandbox_id: str, wanted: str) -> bool:
    return await status(served, sandbox_id) == wanted


@on_one
async def test_heartbeats_alone_do_not_make_a_host_online(served: Served) -> None:
    host_id, token = await served.add("alpha")
    # Nothing listens there.
    made = await served.ask(
        "POST", "/v1/hosts/register", 201, json=registration(token, address="https://127.0.0.1:1")
    )
    beat = {"address": "https://127.0.0.1:1", "facts": FACTS}
    headers = {"x-host-token": made["token"]}

    async def unreachable() -> bool:
        await served.ask("POST", f"/v1/hosts/{host_id}/heartbeat", 204, json=beat, headers=headers)
        await served.platform.reconciler.tick()
        return bool((await served.host(host_id))["status"] == "unreachable")

    await until(unreachable)
    host = await served.host(host_id)
    assert host["heartbeat_at"] > host["reached_at"]
    wrong = await served.http.post(
        f"/v1/hosts/{host_id}/heartbeat", json=beat, headers={"x-host-token": token}
    )
    assert wrong.status_code == 401


@on_one
async def test_a_certificate_is_renewed_at_half_of_its_life(served: Served) -> None:
    host_id, token = await served.add("alpha")
    with machine_directory() as directory:
        async with member(directory, wish(served, token)):
            pass
        kept = directory / "data/membership.json"
        before = json.loads(kept.read_bytes())
        older = {**before, "issued_at": before["issued_at"] - 8 * 86400}
        kept.write_text(json.dumps(older))
        async with member(directory):
            await until(lambda: _changed(kept, older))
            after = json.loads(kept.read_bytes())
            assert after["certificate"] != before["certificate"] and after["key"] != before["key"]
            assert after["token"] == before["token"]
            # Whoever connects now is shown the new one.
            await served.platform.reconciler.tick()
            await create(served)
    async with served.platform.db.read() as session:
        row = await session.get(tables.Host, host_id)
        assert row is not None and len(row.certificate_serials) == 2
        newest = x509.load_pem_x509_certificate(after["certificate"].encode())
        assert int(row.certificate_serials[0], 16) == newest.serial_number


async def _changed(file: Path, before: dict[str, Any]) -> bool:
    return bool(json.loads(file.read_bytes()) != before)


@on_one
async def test_a_revoked_host_is_kept_out_until_it_registers_again(served: Served) -> None:
    async with joined(served) as (host_id, agent, directory):
        sandbox_id = await create(served)
        reached = await served.platform.hosts.agent(host_id)
        await served.ask("POST", f"/v1/hosts/{host_id}/revoke")
        with pytest.raises(Unavailable):
            await served.platform.hosts.agent(host_id)
        # The connection that was there is none any more.
        with pytest.raises(Unavailable):
            await reached.list_sandboxes()
        await until(lambda: _has(served, sandbox_id, "missing"))
        assert not agent.task.done()
        agent.leave.set()
        await asyncio.wait({agent.task})
        agent.fakes.data.close()
        token = (await served.ask("POST", f"/v1/hosts/{host_id}/token", 201))["token"]
        async with member(directory, wish(served, token)):
            await until(lambda: _has(served, sandbox_id, "running"))


async def test_a_host_with_sandboxes_is_deleted_by_force_alone(served: Served) -> None:
    async with joined(served) as (host_id, agent, directory):
        running, paused = await create(served), await create(served)
        await served.ask("POST", f"/v1/sandboxes/{paused}/pause")
        snapshot = {"sandbox_id": running, "name": "kept", "live": True}
        await served.ask("POST", "/v1/snapshots", 201, json=snapshot)
        refused = await served.http.delete(f"/v1/hosts/{host_id}")
        assert refused.status_code == 409
        for each in (running, paused, "template kept"):
            assert each in refused.json()["error"]["message"]
        preview = await served.ask("GET", f"/v1/hosts/{host_id}/delete-preview")
        assert preview == {"sandbox_ids": [running, paused], "templates": ["kept"]}
        assert not (await served.host(host_id))["draining"]
        await served.ask("DELETE", f"/v1/hosts/{host_id}?force=true", 204)
        assert [await status(served, each) for each in (running, paused)] == ["stopped"] * 2
        async with asyncio.timeout(10):
            await agent.task
        assert not find_vms(directory)
        assert not (directory / "data/membership.json").exists()
    assert (await served.http.get(f"/v1/hosts/{host_id}")).status_code == 404
    assert await served.ask("GET", "/v1/hosts") == []
    # The name is free again.
    await served.add("alpha")


@on_one
async def test_a_host_that_is_gone_is_deleted_by_force_alone(served: Served) -> None:
    host_id, token = await served.add("alpha")
    with machine_directory() as directory:
        async with member(directory, wish(served, token)):
            pass
        refused = await served.http.delete(f"/v1/hosts/{host_id}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert not (await served.host(host_id))["draining"]
        await served.ask("DELETE", f"/v1/hosts/{host_id}?force=true", 204)
        # It comes back, hears that it was deleted, and goes on by itself.
        async with member(directory) as agent:
            token = json.loads((directory / "data/membership.json").read_bytes())["token"]
            beat = {"address": agent.address, "facts": FACTS}
            gone = await served.http.post(
                f"/v1/hosts/{host_id}/heartbeat", json=beat, headers={"x-host-token": token}
            )
            assert gone.status_code == 404
            assert not agent.task.done()


@on_one
async def test_a_drained_host_takes_nothing_new(served: Served) -> None:
    async with joined(served, "alpha") as (alpha, _, _), joined(served, "beta") as (beta, _, _):
        await served.ask("POST", f"/v1/hosts/{alpha}/drain")
        for _ in range(2):
            await create(served)
        assert (await served.host(beta))["running"] == 2
        await served.ask("POST", f"/v1/hosts/{beta}/drain")
        refused = await served.http.post("/v1/sandboxes", json=NEW)
        assert refused.status_code == 429
        assert "drained" in refused.json()["error"]["message"]
        await served.ask("POST", f"/v1/hosts/{alpha}/undrain")
        await create(served)
        assert (await served.host(alpha))["running"] == 1


async def test_of_two_with_one_token_one_registers(served: Served) -> None:
    host_id, token = await served.add("alpha")
    answers = await asyncio.gather(
        *(served.http.post("/v1/hosts/register", json=registration(token)) for _ in range(4))
    )
    assert sorted(each.status_code for each in answers) == [201, 401, 401, 401]
    (made,) = [each.json() for each in answers if each.status_code == 201]
    assert made["host_id"] == host_id


async def test_what_is_wrong_is_refused_and_costs_no_token(served: Served) -> None:
    _, token = await served.add("alpha")
    other = request_of(rsa.generate_private_key(public_exponent=65537, key_size=2048))
    good = x509.load_pem_x509_csr(request_of().encode()).public_bytes(serialization.Encoding.DER)
    tampered = good[:-1] + bytes([good[-1] ^ 1])
    signed_by_none = x509.load_der_x509_csr(tampered).public_bytes(serialization.Encoding.PEM)
    for wrong in (
        {"request": "nonsense"},
        {"request": other},
        {"request": signed_by_none.decode()},
        {"address": "unix:/run/somewhere.sock"},
        {"address": "https://169.254.169.254:443"},
        {"facts": {**FACTS, "cpu_overcommit": -1}},
        {"facts": {**FACTS, "cpus": "many"}},
    ):
        refused = await served.http.post("/v1/hosts/register", json=registration(token, **wrong))
        assert refused.status_code == 400, (wrong, refused.text)
    await served.ask("POST", "/v1/hosts/register", 201, json=registration(token))


@on_one
async def test_a_token_that_is_too_old_is_refused(served: Served) -> None:
    host_id, token = await served.add("alpha")
    async with served.platform.db.write() as session:
        await session.execute(update(tables.Host).values(registration_expires_at=time.time() - 1))
    refused = await served.http.post("/v1/hosts/register", json=registration(token))
    assert refused.status_code == 401
    fresh = (await served.ask("POST", f"/v1/hosts/{host_id}/token", 201))["token"]
    await served.ask("POST", "/v1/hosts/register", 201, json=registration(fresh))


async def test_hosts_are_for_administrators(served: Served) -> None:
    host_id, _ = await served.add("alpha")
    _, key = await make_team(served.platform)
    async with client_of(served.platform, **{"x-api-key": key}) as http:
        for method, path in [
            ("GET", ""),
            ("POST", ""),
            ("GET", f"/{host_id}"),
            ("GET", f"/{host_id}/delete-preview"),
            ("DELETE", f"/{host_id}"),
            ("POST", f"/{host_id}/token"),
            ("POST", f"/{host_id}/drain"),
            ("POST", f"/{host_id}/undrain"),
            ("POST", f"/{host_id}/revoke"),
        ]:
            body = {"name": "mine"} if (method, path) == ("POST", "") else None
            answer = await http.request(method, f"/v1/hosts{path}", json=body)
            assert answer.status_code == 403, (method, path, answer.text)
    again = await served.http.post("/v1/hosts", json={"name": "alpha"})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "already_exists")


@on_one
async def test_a_token_of_another_platform_is_not_used(served: Served) -> None:
    _, token = await served.add("alpha")
    with machine_directory() as directory:
        # What answers is not the one that the token was made by.
        forged = f"{token.partition('.')[0]}.{'0' * 32}"
        with pytest.raises(Unauthenticated):
            async with member(directory, wish(served, forged)):
                pass
        assert not (directory / "data/membership.json").exists()


async def test_an_agent_does_not_send_its_token_in_the_clear(tmp_path: Path) -> None:
    with machine_directory() as directory:
        plain = Wish(control="http://198.51.100.1", token="smr_x.y", listen="127.0.0.1:0")
        with pytest.raises(Invalid, match="plain HTTP"):
            async with member(directory, plain):
                pass
        # And without a membership nothing but the unix socket is served.
        async with member(directory, NO_WISH) as agent:
            assert agent.address == ""


@pytest.mark.parametrize(
    "address",
    [
        "",
        "unix:/run/x",
        "http://h:1",
        "https://h",
        "https://h:0",
        "https://h:99999",
        "https://user:pw@h:1",
        "https://h:1/path",
        "https://h:1?x",
        "https://0.0.0.0:1",
        "https://[fe80::1]:1",
        "https://169.254.169.254:1",
        "https://224.0.0.1:1",
        "https://h\n:1",
        f"https://{'h' * 400}:1",
    ],
)
def test_such_an_address_is_none(address: str) -> None:
    with pytest.raises(Invalid):
        check_address(address)


def test_such_an_address_is_one() -> None:
    for address in ("https://host-1.example:7443", "https://10.0.0.7:7443", "https://[::1]:7443"):
        assert check_address(address) == address
