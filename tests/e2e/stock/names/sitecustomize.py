"""Names below `localhost` are this machine (RFC 6761), whatever resolver it has."""

import socket

_usual = socket.getaddrinfo


def _look_up(host, *words, **options):
    name = host.decode() if isinstance(host, bytes) else host
    own = isinstance(name, str) and name.endswith(".localhost")
    return _usual("127.0.0.1" if own else host, *words, **options)


socket.getaddrinfo = _look_up
