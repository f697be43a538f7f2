"""What an image says of the sandboxes that are made from it, in `template.json` beside it.

Their shape when none is asked for, what is started in them after every boot, and by what it is
known that this is ready. An image without that file says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sandmartin.agent.journal import write_whole
from sandmartin.errors import Invalid
from sandmartin.model import MAX_VCPUS, MIN_MEMORY_MB, Shape

_FILE = "template.json"
_MAX_BYTES = 1 << 20
_MAX_DEADLINE_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Start:
    """What is started: a command of the shell, which goes on for as long as it likes."""

    command: str
    user: str = "root"
    #: Empty is the user's home.
    cwd: str = ""
    envs: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        texts = (self.command, self.user, self.cwd, *self.envs, *self.envs.values())
        if not all(isinstance(text, str) and "\0" not in text for text in texts):
            raise Invalid("what an image starts has a text that is none")
        if not self.command or not self.user or any(not n or "=" in n for n in self.envs):
            raise Invalid("what an image starts has no command, no user, or a bad variable")


@dataclass(frozen=True, kw_only=True)
class Ready:
    """By what it is known that sandboxes can be used: an answer over HTTP, or a command.

    With a `port`, `GET path` must be answered with 200 to 299; with a `command` of the shell, it
    must exit 0; with neither, whatever was started is ready at once.
    """

    port: int = 0
    path: str = "/"
    command: str = ""
    #: Since what is started was.
    deadline_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16 or (self.port and self.command):
            raise Invalid("an image's ready check has no port that there can be, or two ways")
        if not self.path.startswith("/") or not self.path.isprintable() or " " in self.path:
            raise Invalid(f"the path {self.path[:80]!r} of an image's ready check is none")
        if not 0 < self.deadline_s <= _MAX_DEADLINE_S:
            raise Invalid(f"a ready check's deadline_s is {self.deadline_s}")


@dataclass(frozen=True, kw_only=True)
class Traits:
    """All that an image says. A number of 0 is not said."""

    vcpus: int = 0
    memory_mb: int = 0
    start: Start | None = None
    ready: Ready = Ready()

    def __post_init__(self) -> None:
        if not 0 <= self.vcpus <= MAX_VCPUS or (self.memory_mb and self.memory_mb < MIN_MEMORY_MB):
            raise Invalid(f"an image wants {self.vcpus} vCPUs and {self.memory_mb} MiB of memory")

    @property
    def shape(self) -> Shape:
        """Of a sandbox for which none is asked for."""
        usual = Shape()
        return Shape(vcpus=self.vcpus or usual.vcpus, memory_mb=self.memory_mb or usual.memory_mb)

    @property
    def starts(self) -> bool:
        """Whether something has to be done after a boot before sandboxes can be used."""
        return self.start is not None or bool(self.ready.port or self.ready.command)

    @classmethod
    def of(cls, image: Path) -> Traits:
        """Of the image in a file. Raises Invalid when they cannot be read."""
        try:
            content = image.with_name(_FILE).read_bytes()
        except FileNotFoundError:
            return cls()
        return cls.parse(content, image.parent.name)

    @classmethod
    def parse(cls, content: bytes, what: str) -> Traits:
        """From JSON; `what` is named in errors. Raises Invalid."""
        try:
            if len(content) > _MAX_BYTES:
                raise ValueError("it is too long")
            raw: dict[str, Any] = json.loads(content)
            start, ready = raw.pop("start", None), raw.pop("ready", None)
            return cls(
                **raw,
                start=Start(**start) if start else None,
                ready=Ready(**ready) if ready else Ready(),
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise Invalid(f"what image {what} says of itself cannot be read: {error}") from error

    def write(self, image: Path) -> None:
        """Say it of the image in a file."""
        content = json.dumps(asdict(self), indent=1).encode()
        write_whole(image.with_name(_FILE), content, mode=0o644, sync=True)

    def digest_words(self) -> str:
        """The same for the same traits, with what must not be shown."""
        return json.dumps(asdict(self), sort_keys=True)


def install(recipe: Path, entry: Path) -> None:
    """Put what a recipe says, if anything, beside the image that is built from it."""
    content = recipe / _FILE
    if content.exists():
        Traits.parse(content.read_bytes(), recipe.name).write(entry / "rootfs.ext4")
