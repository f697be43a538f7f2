"""Telemetry: figures for Prometheus, and the log with what each line belongs to.

Figures of requests and operations are counted by this replica; those of sandboxes, hosts and
deliveries are read from the database when somebody asks, and so are the same at every replica.
Labels come from small fixed sets: a route is its pattern, never the path that was asked for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import time
from collections.abc import Iterator, MutableMapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from sqlalchemy import func, select
from sqlalchemy.pool import QueuePool

from sandmartin import __version__
from sandmartin.control.db import Database
from sandmartin.control.operations import Kind, Operations
from sandmartin.control.reconciler import Reconciler
from sandmartin.control.states import HostState
from sandmartin.control.tables import Delivery, Host, Sandbox
from sandmartin.model import State

_request_id: ContextVar[str] = ContextVar("request_id", default="")
_sandbox_id: ContextVar[str] = ContextVar("sandbox_id", default="")

_SANDBOX_PATH = re.compile(r"/(?:v1/|v2/)?(?:sandboxes|capsules)/(sb[a-z0-9]{20})(?:/|$)")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
#: They tell each request with its address, and each statement with its values: any may be secret.
_TALKATIVE = ("httpx", "httpcore", "aiosqlite")

_log = logging.getLogger(__name__)


class Telemetry:
    """The figures of one replica."""

    def __init__(self, db: Database, operations: Operations, reconciler: Reconciler) -> None:
        self._db = db
        self._reconciler = reconciler
        self._registry = registry = CollectorRegistry()
        self._requests = Histogram(
            "sandmartin_request_seconds",
            "Requests by route, method and status.",
            ("method", "route", "status"),
            buckets=_SECONDS,
            registry=registry,
        )
        self._open = Gauge(
            "sandmartin_requests_open", "Requests being served now.", registry=registry
        )
        self._operations = Histogram(
            "sandmartin_operation_seconds",
            "Operations by kind and outcome.",
            ("kind", "outcome"),
            buckets=_SECONDS,
            registry=registry,
        )
        operations.ended = self._operation_ended
        self._add_gauges(registry)

    def _add_gauges(self, registry: CollectorRegistry) -> None:
        self._sandboxes = Gauge(
            "sandmartin_sandboxes", "Sandboxes by state.", ("state",), registry=registry
        )
        self._hosts = Gauge("sandmartin_hosts", "Hosts by state.", ("state",), registry=registry)
        self._deliveries = Gauge(
            "sandmartin_deliveries_open", "Notifications on their way.", registry=registry
        )
        self._lag = Gauge(
            "sandmartin_reconciler_lag_seconds",
            "Since all hosts were looked at; NaN where another replica does it.",
            registry=registry,
        )
        self._pool = Gauge(
            "sandmartin_db_connections", "Database connections by use.", ("use",), registry=registry
        )
        build = Gauge("sandmartin_info", "This release.", ("version",), registry=registry)
        build.labels(__version__).set(1)

    def _operation_ended(self, kind: Kind, error_code: str, seconds: float) -> None:
        self._operations.labels(kind, error_code or "success").observe(seconds)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """A request is being served."""
        with self._open.track_inprogress():
            yield

    def served(self, method: str, route: str, status: int, seconds: float) -> None:
        self._requests.labels(method, route, str(status)).observe(seconds)

    async def render(self) -> bytes:
        """All figures, in the text form of Prometheus. Raises Unavailable."""
        open_ = select(func.count()).where(Delivery.finished_at.is_(None))
        async with self._db.read() as session:
            sandboxes = await session.execute(
                select(Sandbox.state, func.count()).group_by(Sandbox.state)
            )
            hosts = await session.execute(select(Host.state, func.count()).group_by(Host.state))
            _fill(self._sandboxes, State, sandboxes.all())
            _fill(self._hosts, HostState, hosts.all())
            self._deliveries.set(await session.scalar(open_) or 0)
        looked_at = self._reconciler.looked_at
        self._lag.set(time.time() - looked_at if looked_at else float("nan"))
        pool = self._db.engine.pool
        if isinstance(pool, QueuePool):
            self._pool.labels("used").set(pool.checkedout())
            self._pool.labels("idle").set(pool.checkedin())
        return generate_latest(self._registry)


def _fill(gauge: Gauge, states: Any, counted: Any) -> None:
    found = {state: count for state, count in counted}
    for state in states:
        gauge.labels(state).set(found.get(state, 0))


# The log.


@contextlib.contextmanager
def about(*, request_id: str = "", sandbox_id: str = "") -> Iterator[None]:
    """What is logged in this context, and in tasks begun in it, belongs to these."""
    tokens = [
        (_request_id, _request_id.set(request_id)),
        (_sandbox_id, _sandbox_id.set(sandbox_id)),
    ]
    try:
        yield
    finally:
        for variable, token in tokens:
            variable.reset(token)


def sandbox_of(path: str) -> str:
    """The sandbox that a path of the API is about, if any."""
    match = _SANDBOX_PATH.match(path)
    return match[1] if match else ""


class JsonLines(logging.Formatter):
    """Each record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line: MutableMapping[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, variable in (("request_id", _request_id), ("sandbox_id", _sandbox_id)):
            if value := variable.get():
                line[name] = value
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up_logging(level: str, form: str, stream: TextIO | None = None) -> None:
    """Log to standard error, or to a stream, as `text` or as `json` lines."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        JsonLines()
        if form == "json"
        else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
