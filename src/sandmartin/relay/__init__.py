"""Passing requests on: what control plane and host agent have in common on the way to a guest.

Knows neither side. Requests and answers are framed HTTP/1.1, each parsed and written anew; only
what a guest has agreed to switch to is passed on byte for byte.
"""
