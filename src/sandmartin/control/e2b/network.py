"""What a sandbox may reach, in E2B's words and in ours."""

from __future__ import annotations

from fastapi import APIRouter, Response

from sandmartin.control import tables
from sandmartin.control.api.access import TheCaller, ThePlatform
from sandmartin.control.e2b import bodies
from sandmartin.control.e2b.options import check_network
from sandmartin.control.e2b.steps import step
from sandmartin.model import NetworkPolicy

router = APIRouter()


@router.put("/sandboxes/{sandbox_id}/network", status_code=204)
async def update(
    sandbox_id: str, body: bodies.NetworkUpdate, caller: TheCaller, platform: ThePlatform
) -> Response:
    """Replace all that it may reach, on open connections too; what is left out is cleared."""
    check_network(body)
    policy = _policy(body, body.allow_internet_access)

    async def act(row: tables.Sandbox) -> None:
        await platform.sandboxes.set_network(caller, row.sandbox_id, policy)

    await step(platform, caller, sandbox_id, act)
    return Response(status_code=204)


def wanted_policy(body: bodies.NewSandbox) -> NetworkPolicy | None:
    """What a new sandbox may reach; None where nothing is said. Raises Invalid."""
    egress = body.network or bodies.Egress()
    said = (body.allow_internet_access, egress.allow_out, egress.deny_out)
    if all(each is None for each in said):
        return None
    return _policy(egress, body.allow_internet_access)


def _policy(egress: bodies.Egress, allow_internet_access: bool | None) -> NetworkPolicy:
    return NetworkPolicy(
        allow_internet_access=allow_internet_access is not False,
        allow_out=tuple(egress.allow_out or ()),
        deny_out=tuple(egress.deny_out or ()),
    )
