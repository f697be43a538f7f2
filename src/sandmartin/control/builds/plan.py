"""The one form of a template's build, whichever language it was written in.

A build is stages; a stage is what it starts from and steps in order; the last stage becomes the
template. A step says what was written: variables are expanded by `actions`, when the stage's
ground is known. Values of secrets are never here, their names are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from sandmartin.context.source import Note, Position
from sandmartin.control.builds.text import Text

DEFAULT_SHELL = ("/bin/sh", "-c")


@dataclass(frozen=True)
class Image:
    """An image of a registry, by its reference."""

    reference: str


@dataclass(frozen=True)
class Template:
    """A template of the team or of the platform."""

    name: str


@dataclass(frozen=True)
class RootArchive:
    """A root file system that was uploaded as an archive, by its SHA-256 in hex."""

    sha256: str


@dataclass(frozen=True)
class Scratch:
    """Nothing."""


@dataclass(frozen=True)
class FromStage:
    """What an earlier stage came to, by its name."""

    name: str


Ground = Image | Template | RootArchive | Scratch | FromStage


@dataclass(frozen=True)
class Context:
    """The files that were uploaded with the build."""


@dataclass(frozen=True)
class Upload:
    """Files that were uploaded for one step, by the hash that the client chose for them."""

    digest: str


Origin = Context | Upload | FromStage | Image


class Phase(StrEnum):
    """When a step runs: what we add before the user's own steps, those, what we add after."""

    PRE = "pre"
    BUILD = "build"
    POST = "post"


@dataclass(frozen=True)
class Command:
    """What to execute: `words` as they are, or else `line` by the stage's shell."""

    words: tuple[str, ...] = ()
    line: str = ""
    #: Whether `line` is a whole script, which may name its own interpreter by `#!`.
    is_script: bool = False


@dataclass(frozen=True)
class Secret:
    """A secret that a command may read, by its name: in a file, in a variable, or both."""

    name: str
    target: str = ""
    variable: str = ""
    required: bool = False
    mode: int = 0o400
    uid: int = 0
    gid: int = 0


@dataclass(frozen=True)
class Check:
    """When what was started is ready: `command` exits 0. Times are in seconds, 0 is no limit."""

    command: Command
    interval_s: float = 3.0
    timeout_s: float = 10.0
    #: While it lasts a failure does not count; `start_interval_s` is the interval meanwhile.
    start_period_s: float = 0.0
    start_interval_s: float = 3.0
    #: Failures in a row until it is given up; 0 is no limit.
    retries: int = 0


@dataclass(frozen=True, kw_only=True)
class Step:
    """What every step has."""

    position: Position
    #: As it was written, for the log of the build; cut there, not here.
    written: str
    phase: Phase = Phase.BUILD
    #: Whether it and all after it are done even if they are in the cache.
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class Run(Step):
    """A command that must exit 0."""

    command: Command
    secrets: tuple[Secret, ...] = ()
    #: None for the limit of the whole build alone.
    timeout_s: float | None = None
    #: Instead of the stage's user.
    user: Text | None = None


@dataclass(frozen=True)
class Inline:
    """A file whose content stands in the source."""

    name: str
    content: Text


@dataclass(frozen=True, kw_only=True)
class Copy(Step):
    """Files to be put into the image, by the merge rules of `context.tree`."""

    sources: tuple[Text, ...]
    destination: Text
    origin: Origin = Context()
    inline: tuple[Inline, ...] = ()
    #: `user`, `user:group`, or numbers; None for root.
    owner: Text | None = None
    #: Whether they belong to the stage's user when `owner` is None.
    to_user: bool = False
    mode: int | None = None
    #: Whether it was an ADD, which would unpack archives and so must not meet one.
    is_add: bool = False
    timeout_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Env(Step):
    """Variables of all later commands and of the template."""

    pairs: tuple[tuple[str, Text], ...]


@dataclass(frozen=True, kw_only=True)
class Arg(Step):
    """A variable of later commands of the build, not of the template."""

    name: str
    #: None when it is declared alone, and has no value unless one is given.
    value: Text | None


@dataclass(frozen=True, kw_only=True)
class Workdir(Step):
    """The directory of later commands and of the template; made if it is not there."""

    path: Text


@dataclass(frozen=True, kw_only=True)
class User(Step):
    """The user of later commands and of the template."""

    name: Text
    #: Whether the account is made if it is not there, and may use sudo without a password.
    ensure: bool = False


@dataclass(frozen=True, kw_only=True)
class Shell(Step):
    """What later lines are executed by."""

    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Expose(Step):
    """Ports on which the template is expected to listen: `80`, `53/udp`, `8000-8010`."""

    ports: tuple[Text, ...]


@dataclass(frozen=True, kw_only=True)
class Label(Step):
    """What is told about the template."""

    pairs: tuple[tuple[str, Text], ...]


@dataclass(frozen=True, kw_only=True)
class Entrypoint(Step):
    """The first half of the start command; None for none."""

    command: Command | None


@dataclass(frozen=True, kw_only=True)
class Cmd(Step):
    """The other half, or all of it."""

    command: Command | None


@dataclass(frozen=True, kw_only=True)
class Healthcheck(Step):
    """When the template is ready; None for no check, whatever the ground has."""

    check: Check | None


@dataclass(frozen=True, kw_only=True)
class Start(Step):
    """A command that is left running, at this place of the build."""

    command: Command


AnyStep = (
    Run
    | Copy
    | Env
    | Arg
    | Workdir
    | User
    | Shell
    | Expose
    | Label
    | Entrypoint
    | Cmd
    | Healthcheck
    | Start
)


@dataclass(frozen=True)
class Stage:
    """One image of a build. Its name is unique in the build."""

    name: str
    ground: Ground
    steps: tuple[AnyStep, ...]
    position: Position

    @property
    def needs(self) -> frozenset[str]:
        """Names of the stages that must be there before this one."""
        origins = {step.origin for step in self.steps if isinstance(step, Copy)}
        return frozenset(
            each.name for each in {self.ground, *origins} if isinstance(each, FromStage)
        )


@dataclass(frozen=True, kw_only=True)
class Build:
    """A whole build: each stage after those it needs, the template's last."""

    stages: tuple[Stage, ...]
    #: Given from outside, for the ARGs.
    arguments: tuple[tuple[str, str], ...] = ()
    notes: tuple[Note, ...] = field(default=())

    @property
    def template(self) -> Stage:
        """The stage that becomes the template."""
        return self.stages[-1]
