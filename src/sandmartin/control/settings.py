"""Settings of one control plane, from flags, `SANDMARTIN_*` and a TOML file, in that order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sandmartin.errors import Invalid
from sandmartin.model import load_settings

_DOMAIN = re.compile(
    r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*(:[0-9]{1,5})?"
)


@dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """Settings of one replica of the control plane."""

    #: The database where no URL is given, the secret key, and what `up` runs.
    data_dir: Path = Path("/var/lib/sandmartin")
    #: `postgresql://…` or `sqlite:///…`; empty for SQLite in the data directory.
    database_url: str = field(default="", repr=False)
    #: Seals what must be read again; empty for a key in the data directory.
    secret_key: str = field(default="", repr=False)
    host: str = "127.0.0.1"
    port: int = 8000
    #: How the world reaches us: for links, OAuth and cookies. Empty for what we listen on.
    public_url: str = ""
    #: Sandboxes' ports are at names below it, `PORT-ID.DOMAIN`; clients are told. It may end with
    #: a port.
    domain: str = ""
    #: Files of a certificate with its chain, and of its key, as PEM; empty for plain HTTP.
    tls_cert: str = ""
    tls_key: str = ""
    #: Who may sign up: `open`, `invited`, or `closed`.
    sign_up: str = "invited"
    github_client_id: str = ""
    github_client_secret: str = field(default="", repr=False)
    #: Another one for GitHub Enterprise.
    github_url: str = "https://github.com"
    github_api_url: str = "https://api.github.com"
    max_sandboxes: int = 100
    max_vcpus: int = 200
    max_memory_mb: int = 200 * 1024
    #: Of template builds: those that one replica does at a time, those that a team may have under
    #: way, how long one may take, and what of them a team may keep for builds to come.
    builds_at_once: int = 2
    max_builds_per_team: int = 20
    max_build_s: float = 3600.0
    max_layers: int = 100
    max_layers_mb: int = 20 * 1024
    #: The longest that a sandbox may be asked to run for at a time, where its time is limited.
    max_lifetime_s: int = 24 * 3600
    #: For how long a request waits for the sandbox that it wakes.
    wake_s: float = 60.0
    #: How long a client may take to say what it wants, once it is connected or has begun to.
    head_s: float = 30.0
    #: How long a client may take nothing of what waits to be sent to it.
    stall_s: float = 120.0
    #: A host that did not answer for so long is unreachable.
    unreachable_s: float = 90.0
    reconcile_s: float = 5.0
    #: Who may read `/metrics`; empty for this machine alone.
    metrics_token: str = field(default="", repr=False)
    #: Networks that webhooks and the like may reach beside the Internet, separated by commas.
    outgoing_allow: str = ""
    #: For how many days is kept what grows.
    keep_samples_days: float = 60.0
    keep_metrics_days: float = 30.0
    keep_events_days: float = 90.0
    keep_operations_days: float = 7.0
    keep_deliveries_days: float = 7.0
    keep_contexts_days: float = 7.0
    #: Where uploads and templates are kept: `file:///DIRECTORY` or `s3://BUCKET/PREFIX`; empty for
    #: a folder in the data directory. Templates go there only when it is given, and then every
    #: host must reach it.
    artefact_store: str = ""
    #: What nothing refers to is removed from it when it is older.
    artefact_grace_s: float = 3600.0
    artefact_sweep_s: float = 6 * 3600.0

    def __post_init__(self) -> None:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise Invalid("one of tls_cert and tls_key is missing", hint="give both, or neither")
        if self.domain and not _DOMAIN.fullmatch(self.domain):
            raise Invalid(
                f"domain is {self.domain[:80]!r}", hint="use a name, as in sandboxes.example.com"
            )

    @classmethod
    def load(
        cls,
        flags: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
        file: Path | None = None,
    ) -> ControlSettings:
        """As `Settings.load` has it. Raises Invalid."""
        return load_settings(cls, flags, environ, file)

    def listening_on(self, port: int) -> ControlSettings:
        """With the port that was taken, also in the domain where nothing stands before us."""
        usual = port == (443 if self.tls_cert else 80) or self.public_url or ":" in self.domain
        domain = self.domain if usual or not self.domain else f"{self.domain}:{port}"
        return replace(self, port=port, domain=domain)

    @property
    def url(self) -> str:
        """The database."""
        return self.database_url or f"sqlite:///{self.data_dir / 'control.sqlite3'}"

    @property
    def artefact_store_url(self) -> str:
        """The artefact store."""
        return self.artefact_store or (self.data_dir.absolute() / "store").as_uri()

    @property
    def base_url(self) -> str:
        scheme = "https" if self.tls_cert else "http"
        return self.public_url.rstrip("/") or f"{scheme}://{self.host}:{self.port}"
