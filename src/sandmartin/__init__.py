"""Sandmartin: a microVM for every AI agent, user or job."""

__version__ = "0.1.0"
