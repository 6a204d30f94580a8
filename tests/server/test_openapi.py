from __future__ import annotations

import re
from typing import Any

from litestar.routes import ASGIRoute, HTTPRoute

from server.routes import docs
from tests.server.conftest import Live

# Pages that describe the API are no part of it.
PAGES = {path for handler in docs.handlers for path in handler.paths}


def document(live: Live) -> dict[str, Any]:
    found: dict[str, Any] = live.client.get("/openapi.json").json()
    return found


def test_every_route_is_described_and_nothing_else(live: Live) -> None:
    routes = set()
    for route in live.server.application.routes:
        if isinstance(route, ASGIRoute):
            routes.add(("post", route.path_format))
        elif isinstance(route, HTTPRoute) and route.path not in PAGES:
            routes |= {(method.lower(), route.path_format) for method in route.methods if method != "OPTIONS"}
    described = {(method, path) for path, item in document(live)["paths"].items() for method in item}
    assert described == routes


def test_every_reference_leads_somewhere(live: Live) -> None:
    whole = document(live)
    text = live.client.get("/openapi.json").text
    references = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert references
    assert references <= whole["components"]["schemas"].keys()


def test_path_parameters_are_described(live: Live) -> None:
    for path, item in document(live)["paths"].items():
        for operation in item.values():
            named = {one["name"] for one in operation["parameters"] if one["in"] == "path"}
            assert named == set(re.findall(r"{(\w+)}", path))


def test_a_query_parameter_of_the_document_is_one_of_the_handler(live: Live) -> None:
    for route in live.server.application.routes:
        if not isinstance(route, HTTPRoute) or route.path in PAGES:
            continue
        for handler in route.route_handlers:
            parameters = set(handler.parsed_fn_signature.parameters) - {"state", "request", "data"}
            for method in handler.http_methods - {"OPTIONS"}:
                described = document(live)["paths"][route.path_format][method.lower()]["parameters"]
                assert {one["name"] for one in described if one["in"] in ("path", "query")} == parameters


def test_the_recipe_is_described_with_its_limits(live: Live) -> None:
    schemas = document(live)["components"]["schemas"]
    assert schemas["Sgd"]["properties"]["momentum"]["maximum"] == 1.0
    assert set(schemas["Recipe"]["required"]) == {"model", "training_file"}


def test_the_page_needs_nothing_from_elsewhere(live: Live) -> None:
    answer = live.client.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", answer.text)
    assert "/openapi.json" in answer.text
    assert live.client.get("/").headers["location"] == "/docs"
