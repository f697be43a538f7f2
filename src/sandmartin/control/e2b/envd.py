"""The release of envd, E2B's guest agent, whose abilities our own guest agent has."""

from __future__ import annotations

ENVD_VERSION = "0.6.13"
