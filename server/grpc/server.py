"""The gRPC server, on the application's event loop: it begins when the models are loaded, and drains as HTTP does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import grpc
from litestar.datastructures import State

from server.grpc.service import Service
from server.settings import Settings

log = logging.getLogger("espalier.grpc")


@asynccontextmanager
async def serving(state: State) -> AsyncIterator[None]:
    """Serve until the block is left or the server is told to stop, then answer what was accepted, as long as
    drain_seconds allow. Sets state.grpc_port, the port that it listens on. Raises OSError where that is taken."""
    settings: Settings = state.settings
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", settings.max_body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ]
    )
    server.add_generic_rpc_handlers(Service(state).handlers())
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        state.grpc_port = server.add_insecure_port(f"{host}:{settings.grpc_port}")
    except RuntimeError as error:
        raise OSError(f"gRPC cannot listen on {host}:{settings.grpc_port}: {error}") from error
    await server.start()
    log.info("gRPC on %s:%d", host, state.grpc_port)

    async def drain() -> None:
        await state.stopping.wait()
        await server.stop(settings.drain_seconds)

    draining = asyncio.create_task(drain())
    try:
        yield
    finally:
        state.stopping.set()
        with suppress(asyncio.CancelledError):
            await draining
