"""What bounds builds, and how soon what was left lying is taken up."""

from __future__ import annotations

from dataclasses import dataclass, field

from sandmartin.control.builds.layers import LayerLimits
from sandmartin.control.builds.log import LogLimits


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Settings of builds at one replica."""

    #: That one replica does at a time.
    at_once: int = 2
    #: From its first start to its end.
    most_s: float = 3600.0
    attempts: int = 3
    lease_s: float = 30.0
    pick_up_s: float = 1.0
    #: How long what could not be done now waits before it is tried again.
    retry_s: float = 5.0
    #: How often is looked whether somebody wants it to end.
    look_s: float = 0.5
    #: A step that took less is rather done again than kept.
    layer_after_s: float = 1.0
    #: For how long a registry is not asked again what an image is.
    image_fresh_s: float = 3600.0
    #: For how long builds are kept that are over.
    keep_s: float = 30 * 86400.0
    layers: LayerLimits = field(default_factory=LayerLimits)
    log: LogLimits = field(default_factory=LogLimits)
