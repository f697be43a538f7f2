"""What a template brings to its sandboxes: variables, user, directory, ports, labels.

Kept as plain values beside the template and beside each of its sandboxes. Whoever runs a command
may say otherwise of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sandmartin.control.builds import plan
from sandmartin.control.builds.actions import Defaults
from sandmartin.transport import Command, ImportedImage


def defaults_to_dict(defaults: Defaults, build: plan.Build) -> dict[str, Any]:
    """What sandboxes and later builds need to know of what `build` came to.

    A user and a directory that nobody named are left to whoever asks: E2B's clients have others.
    """
    named = {type(step) for stage in build.stages for step in stage.steps}
    user_named = plan.User in named or defaults.user != Defaults.user
    workdir_named = plan.Workdir in named or defaults.workdir != Defaults.workdir
    return {
        "envs": dict(defaults.envs),
        "user": defaults.user if user_named else "",
        "workdir": defaults.workdir if workdir_named else "",
        "ports": list(defaults.ports),
        "labels": dict(defaults.labels),
    }


def defaults_from_dict(raw: Mapping[str, Any]) -> Defaults:
    return Defaults(
        envs=dict(raw.get("envs", {})),
        user=raw.get("user") or "root",
        workdir=raw.get("workdir") or "/",
        ports=tuple(raw.get("ports", ())),
        labels=dict(raw.get("labels", {})),
        entrypoint=tuple(raw.get("entrypoint", ())),
        cmd=tuple(raw.get("cmd", ())),
    )


def image_to_dict(image: ImportedImage) -> dict[str, Any]:
    """What is kept of an image beside the template that it became."""
    return {
        "digest": image.digest,
        "envs": dict(image.envs),
        "user": image.user,
        "workdir": image.workdir,
        "ports": list(image.ports),
        "entrypoint": list(image.entrypoint),
        "cmd": list(image.cmd),
    }


def account(user: str) -> str:
    """Of `user:group` what commands are run as; the group is that of the account."""
    return user.partition(":")[0]


def with_defaults(command: Command, raw: Mapping[str, Any]) -> Command:
    """A command of a sandbox with what its template says where the command says nothing.

    The directory is only that of the template's own user: another one has a home.
    """
    if not raw or command.user:
        return command
    user = str(raw.get("user", ""))
    workdir = str(raw.get("workdir", ""))
    # A directory of `/` is none that was chosen.
    cwd = command.cwd or (workdir if workdir != "/" else "")
    return replace(command, user=account(user), cwd=cwd)
