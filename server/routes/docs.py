"""The API's description: /openapi.json for programs, /docs for people. Neither needs anything from elsewhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from litestar import MediaType, Response, get
from litestar.response import Redirect

from server.openapi import document

PAGE = Path(__file__).parent.parent / "static" / "docs.html"
# The page's own style and script are inside it, and it asks only this server.
POLICY = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@cache
def page() -> bytes:
    return PAGE.read_bytes()


@get("/openapi.json", sync_to_thread=False)
def openapi() -> Response[bytes]:
    return Response(document(), media_type=MediaType.JSON)


@get("/docs", sync_to_thread=False)
def docs() -> Response[bytes]:
    return Response(page(), media_type=MediaType.HTML, headers={"content-security-policy": POLICY})


@get("/", sync_to_thread=False)
def root() -> Redirect:
    return Redirect("/docs")


handlers = [openapi, docs, root]
