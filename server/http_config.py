"""How uvicorn speaks HTTP here, alone and as a front-end: clients must not see which of them answers."""

from __future__ import annotations

from typing import Any

import uvicorn

from server.settings import Settings


def http_config(app: Any, settings: Settings, **more: Any) -> uvicorn.Config:
    """more: what else uvicorn is told, as where it listens."""
    return uvicorn.Config(
        app,
        ws="none",
        proxy_headers=False,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=round(settings.drain_seconds),
        **more,
    )
