"""One line an event on standard error, as text for people or as JSON for collectors.

A line of JSON that belongs to a request says which: `request_id`, and as far as they are known `key` (the public part
of the caller's), `model` and `version`; that of a request that was slow or failed `method`, `path`, `status` and
`seconds`, too.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import msgspec

from server.settings import Settings

# The request that is being answered, as ASGI's `state` of it; threads that are started for it know it as well.
request: ContextVar[Mapping[str, Any] | None] = ContextVar("request", default=None)


def told(of: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a request. of: its `request_id`; where they are known `caller`, a server.access.Caller, and
    `model`, name and version."""
    found: dict[str, Any] = {"request_id": of["request_id"]}
    if (caller := of.get("caller")) is not None:
        found["key"] = caller.id
    if (model := of.get("model")) is not None:
        found["model"], found["version"] = model
    return found


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        of = getattr(record, "request", None) or request.get()
        if of is not None and "request_id" in of:
            line |= told(of)
        line |= getattr(record, "about", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure(settings: Settings) -> None:
    """Set up the root logger. uvicorn's own lines are shown from warnings on: ours say the rest."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", datefmt="%H:%M:%S")
    handler.setFormatter(JsonLines() if settings.log_format == "json" else text)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
