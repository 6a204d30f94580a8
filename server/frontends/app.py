"""What a front-end answers: the routes of inference by itself, everything else as the inference process does."""

from __future__ import annotations

from litestar import Litestar
from litestar.datastructures import State
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send

from server.errors import exception_handlers
from server.frontends.proxy import Proxy
from server.hot_routes import hot_route
from server.routes import classify, embeddings, images, predict
from server.routes.v2 import infer

# Of models whose rows cross; those that write texts are asked where they are.
HANDLERS = (*classify.handlers, *embeddings.handlers, *images.handlers, *infer.handlers, *predict.handlers)
PATHS = frozenset(path for handler in HANDLERS for path in handler.paths)


class FrontendApp:
    """ASGI application. proxied: requests that were passed on and are not reported yet."""

    def __init__(self, routes: ASGIApp, proxy: Proxy) -> None:
        self.routes, self.proxy = routes, proxy
        self.proxied = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == ScopeType.HTTP and not is_here(scope["path"]):
            self.proxied += 1
            await self.proxy(scope, receive, send)
            return
        await self.routes(scope, receive, send)


def is_here(path: str) -> bool:
    return hot_route(path) is not None or path in PATHS


def routes_of(state: State) -> Litestar:
    """state: what `exchange.Shared` names."""
    return Litestar(
        route_handlers=list(HANDLERS),
        state=state,
        exception_handlers=exception_handlers,
        openapi_config=None,
        request_max_body_size=state.settings.max_body_bytes,
        logging_config=None,
    )
