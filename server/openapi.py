"""The OpenAPI document: Litestar's, from the types of the handlers, and the bare ASGI routes, described here."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Litestar

from server.errors import ErrorBody
from server.routes.inference import ClassifyAnswer, EmbeddingsAnswer

TEMPLATE = "#/components/schemas/{name}"
MODEL = {"type": "string", "description": 'a served model, "name" or "name:version"'}
TOP_K = {"type": "integer", "minimum": 1, "default": 5, "description": "how many labels to answer"}
VECTOR = {"type": "array", "items": {"type": "number"}}
INPUT = {
    "description": "a text, an image as a data URL (data:image/png;base64,...), a vector of numbers, or a list of them",
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        VECTOR,
        {"type": "array", "items": VECTOR},
    ],
}
TIMEOUT = {
    "name": "X-Request-Timeout",
    "in": "header",
    "required": False,
    "schema": {"type": "number", "exclusiveMinimum": 0},
    "description": "seconds after which a request that still waits is dropped with 408",
}


def document(app: Litestar) -> bytes:
    """The whole document as JSON."""
    whole: dict[str, Any] = app.openapi_schema.to_schema()
    answers, schemas = msgspec.json.schema_components(
        [ClassifyAnswer, EmbeddingsAnswer, ErrorBody], ref_template=TEMPLATE
    )
    whole.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
    error = {
        "description": "What was wrong, as OpenAI's error object",
        "content": {"application/json": {"schema": answers[2]}},
    }
    whole["paths"]["/v1/classify"] = {"post": classify(answers[0], error)}
    whole["paths"]["/v1/embeddings"] = {"post": embeddings(answers[1], error)}
    for path in whole["paths"].values():
        for operation in path.values():
            if isinstance(operation, dict) and "responses" in operation:
                for status in [s for s in operation["responses"] if s.startswith(("4", "5"))]:
                    del operation["responses"][status]
                operation["responses"]["4XX"] = error
    return msgspec.json.encode(whole)


def classify(answer: Any, error: Any) -> dict[str, Any]:
    query = [
        {"name": "model", "in": "query", "required": False, "schema": MODEL},
        {"name": "top_k", "in": "query", "required": False, "schema": TOP_K},
    ]
    binary = {"schema": {"type": "string", "format": "binary"}}
    form = {
        "type": "object",
        "required": ["file"],
        "properties": {"model": MODEL, "top_k": TOP_K, "file": {"type": "string", "format": "binary"}},
    }
    content = {
        "application/json": {"schema": body({"model": MODEL, "input": INPUT, "top_k": TOP_K})},
        "multipart/form-data": {"schema": form},
        "image/png": binary,
        "image/jpeg": binary,
        "application/octet-stream": binary,
        "text/plain": {"schema": {"type": "string"}},
    }
    return {
        "tags": ["Inference"],
        "operationId": "Classify",
        "summary": "Classify texts, images or vectors",
        "description": "JSON or a form with one or more inputs; or the raw bytes of one, with ?model= in the address.",
        "parameters": [*query, TIMEOUT],
        "requestBody": {"required": True, "content": content},
        "responses": responses(answer, error),
    }


def embeddings(answer: Any, error: Any) -> dict[str, Any]:
    fields = {
        "model": MODEL,
        "input": INPUT,
        "encoding_format": {"enum": ["float", "base64"], "default": "float"},
        "dimensions": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "user": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    }
    return {
        "tags": ["Inference"],
        "operationId": "Embed",
        "summary": "Embeddings of texts, images or vectors, of unit length",
        "description": "As OpenAI's, for every model: an encoder's sentence vectors, a classifier's features.",
        "parameters": [TIMEOUT],
        "requestBody": {"required": True, "content": {"application/json": {"schema": body(fields)}}},
        "responses": responses(answer, error),
    }


def body(fields: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": ["model", "input"], "properties": fields}


def responses(answer: Any, error: Any) -> dict[str, Any]:
    return {
        "200": {"description": "The answers, one an input", "content": {"application/json": {"schema": answer}}},
        "4XX": error,
    }
