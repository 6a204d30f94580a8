"""Several processes on one port: the kernel shares new connections out among their sockets (SO_REUSEPORT)."""

from __future__ import annotations

import socket


def reserved(host: str, port: int) -> socket.socket:
    """A socket that keeps the port for this server and takes no connections. port: 0 takes a free one. Raises OSError
    where somebody else listens there, even one who would share."""
    if port:
        bound(host, port, shared=False).close()
    return bound(host, port, shared=True)


def listener(host: str, port: int) -> socket.socket:
    """A socket of one of the processes."""
    return bound(host, port, shared=True)


def bound(host: str, port: int, *, shared: bool) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made
