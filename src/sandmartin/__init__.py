"""Sandmartin: a microVM for every AI agent, user or job.

    from sandmartin import Sandbox

    with Sandbox.create() as sandbox:
        print(sandbox.commands.run("python3 -c 'print(6*7)'").stdout)

The names of the SDK are here; each is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sandmartin.client.asynchronous import AsyncSandbox as AsyncSandbox
    from sandmartin.client.builds import BuildFailed as BuildFailed
    from sandmartin.client.code import CodeContext as CodeContext
    from sandmartin.client.execution import CodeOutput as CodeOutput
    from sandmartin.client.execution import Execution as Execution
    from sandmartin.client.execution import ExecutionError as ExecutionError
    from sandmartin.client.execution import Logs as Logs
    from sandmartin.client.execution import Result as Result
    from sandmartin.client.git import Credentials as Credentials
    from sandmartin.client.git import GitBranches as GitBranches
    from sandmartin.client.git import GitFile as GitFile
    from sandmartin.client.git import GitStatus as GitStatus
    from sandmartin.client.handle import AsyncCommandHandle as AsyncCommandHandle
    from sandmartin.client.results import CommandFailed as CommandFailed
    from sandmartin.client.results import CommandResult as CommandResult
    from sandmartin.client.results import CommandTimedOut as CommandTimedOut
    from sandmartin.client.synchronous import CommandHandle as CommandHandle
    from sandmartin.client.synchronous import Sandbox as Sandbox
    from sandmartin.client.synchronous import Templates as Templates
    from sandmartin.client.synchronous import Watch as Watch
    from sandmartin.client.template import Template as Template
    from sandmartin.client.templates import AsyncTemplates as AsyncTemplates
    from sandmartin.client.trees import Copied as Copied
    from sandmartin.client.trees import CopyProgress as CopyProgress
    from sandmartin.client.watch import AsyncWatch as AsyncWatch
    from sandmartin.client.watch import FileEvent as FileEvent
    from sandmartin.client.watch import FileEventType as FileEventType
    from sandmartin.errors import SandmartinError as SandmartinError
    from sandmartin.transport import Checkpoint as Checkpoint
    from sandmartin.transport import FileInfo as FileInfo
    from sandmartin.transport import MetricPoint as MetricPoint
    from sandmartin.transport import Process as Process
    from sandmartin.transport import SandboxInfo as SandboxInfo
    from sandmartin.transport import Snapshot as Snapshot
    from sandmartin.transport import Stderr as Stderr
    from sandmartin.transport import Stdout as Stdout
    from sandmartin.transport import TemplateInfo as TemplateInfo
    from sandmartin.transport.builds import Build as Build
    from sandmartin.transport.builds import BuildLog as BuildLog
    from sandmartin.transport.builds import Tag as Tag

_HOMES = {
    "client.asynchronous": ("AsyncSandbox",),
    "client.builds": ("BuildFailed",),
    "client.code": ("CodeContext",),
    "client.execution": ("CodeOutput", "Execution", "ExecutionError", "Logs", "Result"),
    "client.git": ("Credentials", "GitBranches", "GitFile", "GitStatus"),
    "client.handle": ("AsyncCommandHandle",),
    "client.results": ("CommandFailed", "CommandResult", "CommandTimedOut"),
    "client.synchronous": ("CommandHandle", "Sandbox", "Templates", "Watch"),
    "client.template": ("Template",),
    "client.templates": ("AsyncTemplates",),
    "client.trees": ("Copied", "CopyProgress"),
    "client.watch": ("AsyncWatch", "FileEvent", "FileEventType"),
    "errors": ("SandmartinError",),
    "transport": (
        "Checkpoint",
        "FileInfo",
        "MetricPoint",
        "Process",
        "SandboxInfo",
        "Snapshot",
        "Stderr",
        "Stdout",
        "TemplateInfo",
    ),
    "transport.builds": ("Build", "BuildLog", "Tag"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


# For a type checker every name would be there.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME_OF]
