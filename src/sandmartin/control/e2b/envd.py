"""The release of envd, E2B's guest agent, whose abilities our own guest agent has.

A host says which a sandbox's guest has; this is what this release brings, where it does not.
"""

from __future__ import annotations

ENVD_VERSION = "0.6.13"
