"""What a team asks to have built, checked as far as that needs nothing but the words."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sandmartin.context.source import is_plain
from sandmartin.control.builds import plan
from sandmartin.control.builds.dockerfile import read_dockerfile
from sandmartin.control.builds.e2b_steps import read_steps
from sandmartin.control.builds.recipe import read_recipe
from sandmartin.control.tags import check_tags
from sandmartin.errors import Invalid
from sandmartin.model import MAX_VCPUS, MIN_MEMORY_MB, split_tag

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SECRET = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_MAX_SECRETS = 64
_MAX_SECRET_CHARS = 64 * 2**10
KINDS = ("dockerfile", "recipe", "steps")


@dataclass(frozen=True, kw_only=True)
class Source:
    """How a build is written: a text in one of the languages, or E2B's steps."""

    kind: str
    text: str = ""
    file: str = "Dockerfile"
    steps: Sequence[Mapping[str, Any]] = ()
    start_cmd: str = ""
    ready_cmd: str = ""
    #: Of steps: begin as the account `user`, on a template too.
    as_user: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise Invalid(
                f"the source is of kind {self.kind[:40]!r}", hint=f"use {', '.join(KINDS)}"
            )


@dataclass(frozen=True, kw_only=True)
class NewBuild:
    """A build that a team asks for. What is None is left to the defaults. Raises Invalid."""

    #: May end with a tag, which comes before `tags`.
    name: str
    tags: Sequence[str] = ()
    source: Source
    #: What it starts from, where the source does not say: one of these, or `base`.
    from_template: str = ""
    from_image: str = ""
    #: SHA-256 of an upload.
    from_archive: str = ""
    #: Name and password at the registry of an image.
    registry: tuple[str, str] | None = field(default=None, repr=False)
    #: SHA-256 of an upload.
    context: str | None = None
    arguments: Mapping[str, str] = field(default_factory=dict, repr=False)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    #: The last stage to be built, of a Dockerfile; empty for its last.
    target: str = ""
    vcpus: int | None = None
    memory_mb: int | None = None
    disk_size_mb: int | None = None
    no_cache: bool = False
    skip_pre_post: bool = False

    def __post_init__(self) -> None:
        check_tags(self.base_name, self.all_tags)
        if self.vcpus is not None and not 1 <= self.vcpus <= MAX_VCPUS:
            raise Invalid(f"vcpus is {self.vcpus}", hint=f"use 1 to {MAX_VCPUS}")
        if self.memory_mb is not None and self.memory_mb < MIN_MEMORY_MB:
            raise Invalid(f"memory_mb is {self.memory_mb}", hint=f"use at least {MIN_MEMORY_MB}")
        for digest in filter(None, (self.from_archive, self.context)):
            check_digest(digest)
        grounds = [
            each for each in (self.from_template, self.from_image, self.from_archive) if each
        ]
        if len(grounds) > 1 or (grounds and self.source.kind == "dockerfile"):
            raise Invalid(
                "the build starts from more than one thing",
                hint="a Dockerfile has its FROM; else give one of from_template, from_image and"
                " from_archive",
            )
        self._check_secrets()

    def _check_secrets(self) -> None:
        if len(self.secrets) > _MAX_SECRETS or not all(map(_SECRET.fullmatch, self.secrets)):
            raise Invalid("there are too many secrets, or one has no proper name")
        if any(
            len(each) > _MAX_SECRET_CHARS or not is_plain(each) for each in self.secrets.values()
        ):
            raise Invalid("a secret is too long, or has a zero byte")

    @property
    def base_name(self) -> str:
        return split_tag(self.name)[0]

    @property
    def all_tags(self) -> tuple[str, ...]:
        """What it will be called by; the name's own tag first."""
        base, tag = split_tag(self.name)
        own = () if self.name == base and self.tags else (tag,)
        return tuple(dict.fromkeys((*own, *self.tags)))

    def read(self) -> plan.Build:
        """What is to be done. Raises InvalidBuild, which names the place."""
        source = self.source
        match source.kind:
            case "dockerfile":
                return read_dockerfile(
                    source.text, file=source.file, arguments=self.arguments, target=self.target
                )
            case "recipe":
                return read_recipe(
                    source.text,
                    self._ground(),
                    file=source.file,
                    skip_pre_post=self.skip_pre_post,
                )
        return read_steps(
            source.steps,
            self._ground(),
            start=source.start_cmd,
            ready=source.ready_cmd,
            force=self.no_cache,
            as_user=source.as_user,
        )

    def _ground(self) -> plan.Ground:
        if self.from_image:
            return plan.Image(self.from_image)
        if self.from_archive:
            return plan.RootArchive(self.from_archive)
        return plan.Template(self.from_template or "base")

    def to_json(self) -> str:
        """The same for the same request."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> NewBuild:
        raw = json.loads(text)
        registry = raw.pop("registry")
        source = Source(**raw.pop("source"))
        return cls(**raw, source=source, registry=tuple(registry) if registry else None)


def check_digest(digest: str) -> str:
    """Raises Invalid when it is no SHA-256 in hex."""
    if not _DIGEST.fullmatch(digest):
        raise Invalid(f"{digest[:80]!r} is no SHA-256", hint="use 64 of 0-9 and a-f")
    return digest
