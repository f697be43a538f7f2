"""How a build fails that was rightly asked for."""

from __future__ import annotations

from sandmartin.errors import SandmartinError


class StepFailed(SandmartinError):
    """A step of the build failed."""

    code = "build_failed"


class StillBroken(SandmartinError):
    """Something beyond the build failed, and did so each time."""

    code = "unavailable"
