"""The client side of Sandmartin: an async core over one transport interface.

Needs httpx alone, so that it lives in one environment with anything else.
"""
