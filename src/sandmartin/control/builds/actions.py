"""What a stage comes to on its ground: what is to be done, step by step, and the key of each.

A key is the SHA-256 of the key before it and of all that the action's outcome depends on: its own
words with variables expanded, the variables, user and directory it runs with, the digests of the
files it copies, the names of its secrets and never their values. Whoever has the layer of a key
need not do the action. Times, limits and how a step was written are no part of it.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import singledispatchmethod
from typing import Any

from sandmartin.context.source import InvalidBuild, quoted
from sandmartin.control.builds import plan
from sandmartin.control.builds.instructions import refuse_address
from sandmartin.control.builds.text import Text

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MAX_ENVIRONMENT = 128 * 2**10
MAX_PORTS = 1000
_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?(?:/(tcp|udp))?", re.IGNORECASE)
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}\$?(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,31})?")


@dataclass(frozen=True, kw_only=True)
class Action:
    """Something to be done, on what the action before it left."""

    step: plan.AnyStep
    #: In hex.
    key: str = ""
    #: Whether the layer of `key` may be taken and kept: not once a process was left running.
    cacheable: bool = True

    def depends_on(self) -> dict[str, Any]:
        """All of its words that its outcome depends on, as JSON knows them."""
        left_out = {"step", "key", "cacheable", "timeout_s"}
        return {name: value for name, value in asdict(self).items() if name not in left_out}


@dataclass(frozen=True, kw_only=True)
class Execute(Action):
    """Run `argv`, or else `script`, as `user` in `workdir` with nothing but `envs`."""

    argv: tuple[str, ...]
    #: With `#!` at its beginning.
    script: str = ""
    envs: Mapping[str, str]
    workdir: str
    user: str
    secrets: tuple[plan.Secret, ...] = ()
    timeout_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Launch(Execute):
    """Start it and leave it running."""


@dataclass(frozen=True, kw_only=True)
class Place(Action):
    """Put files at `destination`, which is absolute."""

    origin: plan.Origin
    sources: tuple[str, ...]
    destination: str
    #: Whether the destination must be a directory; otherwise it is one if it is there as one.
    into_directory: bool
    #: Names and contents of files that stand in the source.
    inline: tuple[tuple[str, str], ...] = ()
    owner: str
    mode: int | None
    is_add: bool = False
    timeout_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class MakeDirectory(Action):
    """Make `path` and what is above it, if it is not there."""

    path: str
    owner: str


@dataclass(frozen=True, kw_only=True)
class MakeAccount(Action):
    """Make the account `name`, which may use sudo without a password, if it is not there."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What an image or a template brings, and what later sandboxes start with."""

    envs: Mapping[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "root"
    shell: tuple[str, ...] = plan.DEFAULT_SHELL
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    #: As `80/tcp`.
    ports: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    check: plan.Check | None = None
    #: Of a stage of the same build: its ARGs, which a stage that starts from it has too.
    arguments: Mapping[str, str] = field(default_factory=dict)
    #: The step of this build that last said what is started; what an image of a registry would
    #: start is not started unless the build says so.
    started: plan.AnyStep | None = None


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A stage on its ground."""

    actions: tuple[Action, ...]
    #: Of the whole stage, in hex: what a COPY from it and a stage on it depend on.
    key: str
    defaults: Defaults
    #: What a sandbox of it starts with, in this order.
    launches: tuple[Launch, ...]


#: The digest of the files that a Place takes, as `Selection.digest` has it; raises InvalidBuild.
#: Of files of another stage that stage's key will do.
DigestOf = Callable[[Place], str]


def settle(
    stage: plan.Stage,
    ground_key: str,
    defaults: Defaults,
    arguments: Mapping[str, str],
    digest_of: DigestOf,
    *,
    is_template: bool = True,
) -> Settled:
    """What `stage` comes to on a ground with these `defaults`.

    `ground_key` names the ground's content: the digest of an image, the key of a stage. Only what
    `is_template` is started at its end. Raises InvalidBuild for what can only be known now.
    """
    settling = _Settling(stage, ground_key, defaults, arguments, digest_of)
    for step in stage.steps:
        settling.take(step)
    return settling.settled(is_template=is_template)


class _Settling:
    def __init__(
        self,
        stage: plan.Stage,
        ground_key: str,
        defaults: Defaults,
        arguments: Mapping[str, str],
        digest_of: DigestOf,
    ) -> None:
        self._stage = stage
        self._key = hashlib.sha256(f"ground\0{ground_key}".encode()).hexdigest()
        self._now = replace(defaults, envs={"PATH": DEFAULT_PATH} | dict(defaults.envs))
        self._given = arguments
        self._digest_of = digest_of
        self._args = dict(defaults.arguments)
        self._cacheable = True
        self._actions: list[Action] = []

    def settled(self, *, is_template: bool) -> Settled:
        argv = (*self._now.entrypoint, *self._now.cmd)
        if is_template and argv and self._now.started is not None:
            self._add(self._execution(Launch, self._now.started, argv))
        return Settled(
            actions=tuple(self._actions),
            key=self._key,
            defaults=replace(self._now, arguments=dict(self._args)),
            launches=tuple(each for each in self._actions if isinstance(each, Launch)),
        )

    def take(self, step: plan.AnyStep) -> None:
        if step.force:
            self._cacheable = False
        self._take(step)

    @property
    def _variables(self) -> dict[str, str]:
        return self._args | dict(self._now.envs)

    def _expand(self, text: Text, what: str) -> str:
        value = text.expand(self._variables)
        if not value or "\0" in value:
            raise InvalidBuild(
                f"{what} is empty", position=text.position, hint="a variable may not be set"
            )
        return value

    def _add(self, action: Action, more: str = "") -> None:
        words = [self._key, type(action).__name__, action.depends_on(), more]
        self._key = hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()
        # A process that was left running is no part of any layer.
        self._cacheable = self._cacheable and not isinstance(action, Launch)
        self._actions.append(replace(action, key=self._key, cacheable=self._cacheable))

    @singledispatchmethod
    def _take(self, step: plan.AnyStep) -> None:
        raise AssertionError(f"{type(step).__name__} is no step")

    @_take.register
    def _(self, step: plan.Run) -> None:
        argv, script = self._argv(step.command)
        user = self._user(step.user) if step.user is not None else self._now.user
        action = self._execution(Execute, step, argv)
        self._add(
            replace(
                action,
                script=script,
                user=user,
                secrets=step.secrets,
                timeout_s=step.timeout_s,
            )
        )

    @_take.register
    def _(self, step: plan.Start) -> None:
        argv, script = self._argv(step.command)
        self._add(replace(self._execution(Launch, step, argv), script=script))

    def _execution(self, kind: type[Execute], step: plan.AnyStep, argv: tuple[str, ...]) -> Execute:
        now = self._now
        envs = dict(now.envs) if kind is Launch else self._variables
        return kind(step=step, argv=argv, envs=envs, workdir=now.workdir, user=now.user)

    def _argv(self, command: plan.Command) -> tuple[tuple[str, ...], str]:
        if command.is_script and command.line.startswith("#!"):
            return (), command.line
        return command.words or (*self._now.shell, command.line), ""

    @_take.register
    def _(self, step: plan.Copy) -> None:
        destination = self._expand(step.destination, "the destination")
        by_default = self._now.user if step.to_user else "root"
        place = Place(
            step=step,
            origin=step.origin,
            sources=tuple(self._expand(source, "a source") for source in step.sources),
            destination=self._absolute(destination),
            into_directory=destination.endswith(("/", "/.")) or destination in (".", ".."),
            inline=tuple((f.name, f.content.expand(self._variables)) for f in step.inline),
            owner=by_default if step.owner is None else self._user(step.owner),
            mode=step.mode,
            is_add=step.is_add,
            timeout_s=step.timeout_s,
        )
        if len(place.sources) + len(place.inline) > 1 and not place.into_directory:
            raise InvalidBuild(
                f"{quoted(destination)} must end with a slash, as there is more than one source",
                position=step.destination.position,
                text=destination,
            )
        if step.is_add:
            for source in place.sources:
                refuse_address(source, step.position)
        self._add(place, self._digest_of(place) if place.sources else "")

    def _absolute(self, path: str) -> str:
        return posixpath.normpath(posixpath.join("/", self._now.workdir, path)).replace("//", "/")

    @_take.register
    def _(self, step: plan.Env) -> None:
        # All values of one step see what was before it.
        variables = self._variables
        envs = dict(self._now.envs) | {name: value.expand(variables) for name, value in step.pairs}
        self._check_environment(step, envs)
        self._now = replace(self._now, envs=envs)

    @_take.register
    def _(self, step: plan.Arg) -> None:
        if step.name in self._given:
            self._args[step.name] = self._given[step.name]
        elif step.value is not None:
            self._args[step.name] = step.value.expand(self._variables)
        self._check_environment(step, self._args)

    def _check_environment(self, step: plan.AnyStep, envs: Mapping[str, str]) -> None:
        if sum(len(name) + len(value) + 2 for name, value in envs.items()) > MAX_ENVIRONMENT:
            raise InvalidBuild(
                f"the variables are longer than {MAX_ENVIRONMENT} characters in all",
                position=step.position,
            )

    @_take.register
    def _(self, step: plan.Workdir) -> None:
        path = self._absolute(self._expand(step.path, "the directory"))
        self._now = replace(self._now, workdir=path)
        self._add(MakeDirectory(step=step, path=path, owner=self._now.user))

    @_take.register
    def _(self, step: plan.User) -> None:
        name = self._user(step.name)
        self._now = replace(self._now, user=name)
        if step.ensure:
            self._add(MakeAccount(step=step, name=name))

    def _user(self, text: Text) -> str:
        name = self._expand(text, "the user")
        if not _USER.fullmatch(name):
            raise InvalidBuild(
                f"{quoted(name)} is no user",
                position=text.position,
                text=name,
                hint="write NAME or NAME:GROUP, names or numbers",
            )
        return name

    @_take.register
    def _(self, step: plan.Shell) -> None:
        self._now = replace(self._now, shell=step.words)

    @_take.register
    def _(self, step: plan.Expose) -> None:
        ports = dict.fromkeys(self._now.ports)
        for text in step.ports:
            ports |= dict.fromkeys(_ports(self._expand(text, "the port"), text))
        if len(ports) > MAX_PORTS:
            raise InvalidBuild(f"more than {MAX_PORTS} ports", position=step.position)
        self._now = replace(self._now, ports=tuple(ports))

    @_take.register
    def _(self, step: plan.Label) -> None:
        variables = self._variables
        labels = dict(self._now.labels)
        labels |= {name: value.expand(variables) for name, value in step.pairs}
        self._check_environment(step, labels)
        self._now = replace(self._now, labels=labels)

    @_take.register
    def _(self, step: plan.Entrypoint) -> None:
        argv = self._words(step.command)
        # What the ground would have given to its own entrypoint means nothing to another.
        cmd = self._now.cmd if self._cmd_is_ours() else ()
        self._now = replace(self._now, entrypoint=argv, cmd=cmd, started=step)

    @_take.register
    def _(self, step: plan.Cmd) -> None:
        self._now = replace(self._now, cmd=self._words(step.command), started=step)

    def _cmd_is_ours(self) -> bool:
        return any(isinstance(step, plan.Cmd) for step in self._stage.steps)

    def _words(self, command: plan.Command | None) -> tuple[str, ...]:
        return () if command is None else self._argv(command)[0]

    @_take.register
    def _(self, step: plan.Healthcheck) -> None:
        check = step.check
        if check is not None:
            check = replace(check, command=plan.Command(words=self._words(check.command)))
        self._now = replace(self._now, check=check)


def _ports(written: str, text: Text) -> list[str]:
    found = _PORTS.fullmatch(written)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if found is None or not 1 <= first <= last <= 65535 or last - first >= MAX_PORTS:
        raise InvalidBuild(
            f"{quoted(written)} is no port",
            position=text.position,
            text=written,
            hint="write 80, 53/udp or 8000-8010",
        )
    return [f"{port}/{(found[3] or 'tcp').lower()}" for port in range(first, last + 1)]
