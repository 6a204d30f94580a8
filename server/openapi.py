"""The OpenAPI document: every route in one table, its data described by the Structs that encode and decode it.

Written here and not collected from the handlers, since half of what clients need to know (forms, raw bodies, event
streams, the bare ASGI routes) is in no signature. A test compares the table with the routes of the application.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import msgspec

from finetune.data.validation import Report
from finetune.recipe import Recipe
from server.chat_completion import ChatCompletion
from server.chats import ChatRequest
from server.completion import Completion
from server.descriptions import VERSION, IndexEntry, ModelConfig, ModelMetadata, Readiness, ServerMetadata, Statistics
from server.errors import ErrorBody, ProtocolError, speaks_protocol
from server.keys import Scope
from server.prompts import CompletionRequest
from server.routes.classify import ClassifyAnswer
from server.routes.deployments import AliasObject, AliasRequest
from server.routes.embeddings import EmbeddingsAnswer
from server.routes.files import Deleted, FileList, FileObject
from server.routes.health import Health
from server.routes.images import ImagesAnswer, ImagesRequest
from server.routes.jobs import CheckpointList, EventList, JobList, JobObject
from server.routes.keys import KeyList, KeyObject, KeyRequest, NewKey
from server.routes.models import ModelDetails, ModelList
from server.routes.predict import PredictAnswer
from server.routes.tokenize import DetokenizeRequest, Text, TokenizeRequest, Tokens
from server.routes.v2.health import Live, Ready
from server.routes.v2.infer import InferResponse
from server.routes.v2.infer_request import InferRequest
from server.routes.v2.repository import Done, IndexRequest, LoadRequest, UnloadRequest
from server.runtime.deployment import Deployment
from server.scopes import scopes_for

WORDS = """Fine-tune networks over HTTP and ask them.

Upload data (files), submit a recipe (fine_tuning), follow its events, then ask the published model (inference).
Where OpenAI has the same thing the paths and shapes are OpenAI's, so its clients work unchanged; under /v2 they are the
Open Inference Protocol's, for KServe's and Triton's. Errors are {"error": {"message", "type", "param", "code"}}, under
/v2 {"error": "message"}; every answer carries an X-Request-ID that the server's log knows."""

Json = dict[str, Any]

TEXT: Json = {"type": "string"}
KEY: Json = {
    "type": "http",
    "scheme": "bearer",
    "description": "An API key, where the server asks for one: it does when others than its own machine can reach it. "
    "An operation needs one of the scopes that it names.",
}
BINARY: Json = {"type": "string", "format": "binary"}
MODEL: Json = {"type": "string", "description": 'a served model, "name", "name:version" or "name@alias"'}
TOP_K: Json = {"type": "integer", "minimum": 1, "default": 5, "description": "how many labels to answer"}
THRESHOLD: Json = {
    "type": "number",
    "minimum": 0,
    "maximum": 1,
    "default": 0.5,
    "description": "the least probability of a label that is answered, where a model answers sets of labels",
}
VECTOR: Json = {"type": "array", "items": {"type": "number"}}
VECTORS: Json = {"type": "array", "items": VECTOR}
INPUT: Json = {
    "description": "a text, an image as a data URL (data:image/png;base64,...), a vector of numbers, a series of steps "
    "that are lists of numbers (with one channel a list of numbers), or a list of them",
    "anyOf": [TEXT, {"type": "array", "items": TEXT}, VECTOR, VECTORS, {"type": "array", "items": VECTORS}],
}
CLASSIFY: Json = {
    "type": "object",
    "required": ["model", "input"],
    "properties": {"model": MODEL, "input": INPUT, "top_k": TOP_K, "threshold": THRESHOLD},
}
CLASSIFY_FORM: Json = {
    "type": "object",
    "required": ["model", "file"],
    "properties": {
        "model": MODEL,
        "top_k": TOP_K,
        "threshold": THRESHOLD,
        "file": {"type": "array", "items": BINARY},
    },
}
EMBED: Json = {
    "type": "object",
    "required": ["model", "input"],
    "properties": {
        "model": MODEL,
        "input": INPUT,
        "encoding_format": {"enum": ["float", "base64"], "default": "float"},
        "dimensions": {"type": ["integer", "null"], "description": "the model's own width, or left out"},
        "user": {"type": ["string", "null"], "description": "taken and not used"},
    },
}
UPLOAD: Json = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"purpose": {"enum": ["fine-tune"]}, "file": BINARY},
}
RECIPE_EXAMPLE: Json = {"model": "efficientnet-lite0", "training_file": "file-...", "suffix": "digits"}


def parameter(name: str, place: str, schema: Json, words: str) -> Json:
    return {"name": name, "in": place, "required": place == "path", "schema": schema, "description": words}


def page(most: int, usual: int) -> list[Json]:
    limit = {"type": "integer", "minimum": 1, "maximum": most, "default": usual}
    return [
        parameter("after", "query", TEXT, "id of the last one of the page before"),
        parameter("limit", "query", limit, ""),
    ]


MODEL_NAME = parameter("model", "path", TEXT, '"name" or "name@alias"')
MODEL_VERSION = parameter("version", "path", TEXT, "its number")
FILE_ID = parameter("file_id", "path", TEXT, "id of an uploaded file")
NAME = parameter("name", "path", TEXT, "name of a published model")
ALIAS = parameter("alias", "path", TEXT, "letters, digits and ._- after a letter")
IF_MATCH = parameter("If-Match", "header", TEXT, "ETag of the deployment that is to be changed; 412 if it is another")
JOB_ID = parameter("job_id", "path", TEXT, "id of a fine-tuning job")
TIMEOUT = parameter(
    "X-Request-Timeout", "header", {"type": "number", "exclusiveMinimum": 0}, "seconds to wait at most, then 408"
)
PRIORITY = parameter(
    "X-Request-Priority", "header", {"type": "integer", "minimum": -3, "maximum": 3, "default": 0}, "higher goes first"
)

# What the routes take that read any kind of input in any form.
INFERENCE = [
    parameter("model", "query", TEXT, "the model, beside a raw body"),
    parameter("top_k", "query", TOP_K, "how many labels to answer, beside a raw body"),
    parameter("threshold", "query", THRESHOLD, "of the labels in a set, beside a raw body"),
    TIMEOUT,
    PRIORITY,
]
INPUTS: dict[str, Any] = {
    "application/json": CLASSIFY,
    "multipart/form-data": CLASSIFY_FORM,
    "application/octet-stream": BINARY,
    "image/png": BINARY,
    "image/jpeg": BINARY,
    "text/plain": TEXT,
}


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One method of one path. `body`: media type → schema or Struct; `answer` likewise, for status 200."""

    method: str
    path: str
    tag: str
    summary: str
    description: str = ""
    parameters: list[Json] = []
    body: dict[str, Any] = {}
    body_required: bool = True
    example: Any = None
    answer: dict[str, Any]


def json(kind: Any) -> dict[str, Any]:
    return {"application/json": kind}


def of_model(method: str, what: str, *, parameters: Sequence[Json] = (), **described: Any) -> list[Operation]:
    """What /v2 has of a model, and of one version of it."""
    return [
        Operation(
            method=method,
            path=f"/v2/models/{{model}}{version}{what}",
            tag="inference protocol",
            parameters=[*named, *parameters],
            **described,
        )
        for version, named in (("", [MODEL_NAME]), ("/versions/{version}", [MODEL_NAME, MODEL_VERSION]))
    ]


OPERATIONS = (
    Operation(
        method="post",
        path="/v1/files",
        tag="files",
        summary="Upload a data set",
        description="Images: a zip or tar of class folders, or of images with a CSV, JSONL or Parquet file of paths "
        "and labels. Texts and vectors of numbers: CSV, JSONL or Parquet; series of them: JSONL or Parquet. The file "
        "is streamed to disk and read through before the answer comes; one that cannot be used is refused, with the "
        "reason, and not kept.",
        body={"multipart/form-data": UPLOAD},
        example={"purpose": "fine-tune", "file": "@data.zip"},
        answer=json(FileObject),
    ),
    Operation(
        method="get",
        path="/v1/files",
        tag="files",
        summary="List files",
        parameters=[
            *page(10_000, 10_000),
            parameter("purpose", "query", TEXT, "only files of this purpose"),
            parameter("order", "query", {"enum": ["asc", "desc"], "default": "desc"}, "by age; desc: newest first"),
        ],
        answer=json(FileList),
    ),
    Operation(
        method="get",
        path="/v1/files/{file_id}",
        tag="files",
        summary="One file",
        parameters=[FILE_ID],
        answer=json(FileObject),
    ),
    Operation(
        method="get",
        path="/v1/files/{file_id}/report",
        tag="files",
        summary="What the inspection of a file found",
        description="Its kind and columns, items of each class, and broken and duplicate items with their places.",
        parameters=[FILE_ID],
        answer=json(Report),
    ),
    Operation(
        method="get",
        path="/v1/files/{file_id}/content",
        tag="files",
        summary="The bytes as they were uploaded",
        parameters=[FILE_ID],
        answer={"application/octet-stream": BINARY},
    ),
    Operation(
        method="delete",
        path="/v1/files/{file_id}",
        tag="files",
        summary="Delete a file",
        description="Refused with 409 while a job that is not finished needs it.",
        parameters=[FILE_ID],
        answer=json(Deleted),
    ),
    Operation(
        method="post",
        path="/v1/fine_tuning/jobs",
        tag="fine_tuning",
        summary="Submit a fine-tuning job",
        description="The body is a Recipe. What can be known to be wrong with it is said at once, not when it runs.",
        body=json(Recipe),
        example=RECIPE_EXAMPLE,
        answer=json(JobObject),
    ),
    Operation(
        method="get",
        path="/v1/fine_tuning/jobs",
        tag="fine_tuning",
        summary="List jobs, newest first",
        parameters=page(1000, 20),
        answer=json(JobList),
    ),
    Operation(
        method="get",
        path="/v1/fine_tuning/jobs/{job_id}",
        tag="fine_tuning",
        summary="One job",
        parameters=[JOB_ID],
        answer=json(JobObject),
    ),
    Operation(
        method="post",
        path="/v1/fine_tuning/jobs/{job_id}/cancel",
        tag="fine_tuning",
        summary="Cancel a job",
        description="At once while it waits, within its next step while it runs; 409 when it is finished.",
        parameters=[JOB_ID],
        answer=json(JobObject),
    ),
    Operation(
        method="get",
        path="/v1/fine_tuning/jobs/{job_id}/events",
        tag="fine_tuning",
        summary="What happens in a job",
        description="Newest first, by page. With stream=true, or Accept: text/event-stream, all of them from the first "
        "(or behind `after` or Last-Event-ID) as server-sent events that follow the job to its end, then [DONE].",
        parameters=[
            JOB_ID,
            *page(1000, 20),
            parameter("stream", "query", {"type": "boolean", "default": False}, "follow as server-sent events"),
            parameter("Last-Event-ID", "header", TEXT, "go on behind this event of the stream"),
        ],
        answer={"application/json": EventList, "text/event-stream": TEXT},
    ),
    Operation(
        method="get",
        path="/v1/fine_tuning/jobs/{job_id}/checkpoints",
        tag="fine_tuning",
        summary="Checkpoints of a job, newest first",
        parameters=[JOB_ID, *page(1000, 10)],
        answer=json(CheckpointList),
    ),
    Operation(
        method="post",
        path="/v1/classify",
        tag="inference",
        summary="Classify texts, images or vectors",
        description="JSON or a form with one or more inputs; or the raw bytes of one with ?model= in the address. "
        "application/octet-stream is what the graph takes: float32 numbers, uint8 pixels of the model's size. "
        "Answers one of several classes, or the set of labels over the threshold.",
        parameters=INFERENCE,
        body=INPUTS,
        example={"model": "languages", "input": ["Guten Morgen", "bonjour"], "top_k": 3},
        answer=json(ClassifyAnswer),
    ),
    Operation(
        method="post",
        path="/v1/predict",
        tag="inference",
        summary="Predict numbers, ask several heads, or have an input reconstructed",
        description="The body is as for /v1/classify. Numbers come by the names of the targets, with the interval "
        "that they lie in, in 95 of 100 cases, where the model knows it; of a model with several heads, each answers. "
        "An autoencoder answers the input as it comes back from its code, a vector or a PNG as a data URL, its error, "
        "large for what is unlike the training data, and the code.",
        parameters=INFERENCE,
        body=INPUTS,
        example={"model": "prices", "input": [[0.2, 1.5], [0.1, 0.7]]},
        answer=json(PredictAnswer),
    ),
    Operation(
        method="post",
        path="/v1/embeddings",
        tag="inference",
        summary="Embed texts, images or vectors",
        description="As OpenAI's, of unit length, from every model: an encoder's vectors, a classifier's features.",
        parameters=[TIMEOUT, PRIORITY],
        body=json(EMBED),
        example={"model": "minilm", "input": "a sentence"},
        answer=json(EmbeddingsAnswer),
    ),
    Operation(
        method="post",
        path="/v1/completions",
        tag="inference",
        summary="Go on with a text, or translate it",
        description="As OpenAI's, from a language model; a translation model answers the prompt's translation. With "
        "stream=true the text comes in pieces, as server-sent events, then [DONE].",
        parameters=[TIMEOUT],
        body=json(CompletionRequest),
        example={"model": "german", "prompt": "the cat sleeps", "beams": 4},
        answer={"application/json": Completion, "text/event-stream": TEXT},
    ),
    Operation(
        method="post",
        path="/v1/chat/completions",
        tag="inference",
        summary="Answer a chat",
        description="As OpenAI's, from a language model that has a chat template. With response_format the answer is "
        "JSON, JSON that fits a schema, what a regular expression matches, or one of several texts. With stream=true "
        "it comes in pieces, as server-sent events, then [DONE]. X-Request-Timeout is the time for the whole answer.",
        parameters=[TIMEOUT],
        body=json(ChatRequest),
        example={"model": "smollm2", "messages": [{"role": "user", "content": "What is the capital of France?"}]},
        answer={"application/json": ChatCompletion, "text/event-stream": TEXT},
    ),
    Operation(
        method="post",
        path="/v1/tokenize",
        tag="inference",
        summary="The tokens that a model reads a text or a chat as",
        body=json(TokenizeRequest),
        example={"model": "smollm2", "prompt": "the cat sleeps", "return_token_strs": True},
        answer=json(Tokens),
    ),
    Operation(
        method="post",
        path="/v1/detokenize",
        tag="inference",
        summary="The text of tokens",
        body=json(DetokenizeRequest),
        example={"model": "smollm2", "tokens": [504, 2644]},
        answer=json(Text),
    ),
    Operation(
        method="post",
        path="/v1/images/generations",
        tag="inference",
        summary="Make images from noise",
        description="As OpenAI's, PNGs in base64, from a GAN or a variational autoencoder. These are conditioned on "
        "nothing: the prompt, which OpenAI's clients must send, is taken and not used. The same `seed` makes the same "
        "images, of which the first ones do not depend on `n`; or send `latent` vectors, or an `interpolation` from "
        "one image to another.",
        parameters=[TIMEOUT, PRIORITY],
        body=json(ImagesRequest),
        example={"model": "faces", "prompt": "", "n": 4, "seed": 1},
        answer=json(ImagesAnswer),
    ),
    Operation(
        method="get",
        path="/v1/models",
        tag="models",
        summary="What is served and what can be fine-tuned",
        answer=json(ModelList),
    ),
    Operation(
        method="get",
        path="/v1/models/{name}",
        tag="models",
        summary="One model, a served one with its manifest",
        parameters=[parameter("name", "path", TEXT, '"name", "name:version" or "name@alias"')],
        answer=json(ModelDetails),
    ),
    Operation(
        method="get",
        path="/v1/models/{owner}/{name}",
        tag="models",
        summary="One model that can be fine-tuned, by its name on the hub",
        parameters=[parameter("owner", "path", TEXT, "whose it is"), parameter("name", "path", TEXT, "its name")],
        answer=json(ModelDetails),
    ),
    Operation(
        method="post",
        path="/v1/keys",
        tag="keys",
        summary="Make an API key",
        description="Its scopes say what it may do: infer (ask models), train (files and fine-tuning jobs), metrics "
        "(read /metrics), admin (all of these; keys, deployments). The key itself is told once, here.",
        body=json(KeyRequest),
        example={"name": "ci", "scopes": ["infer", "train"], "limits": {"requests_per_minute": 600}},
        answer=json(NewKey),
    ),
    Operation(
        method="get",
        path="/v1/keys",
        tag="keys",
        summary="Keys, the oldest first, with what they used",
        answer=json(KeyList),
    ),
    Operation(
        method="delete",
        path="/v1/keys/{key_id}",
        tag="keys",
        summary="Revoke a key; within a second it opens nothing",
        parameters=[parameter("key_id", "path", TEXT, "what the key begins with, e.g. esp_0a1b2c3d")],
        answer=json(KeyObject),
    ),
    Operation(
        method="get",
        path="/v1/models/{name}/deployment",
        tag="models",
        summary="How a model is served",
        description="Its versions, aliases, traffic, shadow, batching, devices and cache. The ETag is for If-Match.",
        parameters=[NAME],
        answer=json(Deployment),
    ),
    Operation(
        method="put",
        path="/v1/models/{name}/deployment",
        tag="models",
        summary="Replace how a model is served",
        description="What is left out is by default. Versions that it names are loaded first; where one does not load "
        "the answer is 409 and all stays as it was. Requests go on being answered meanwhile.",
        parameters=[NAME, IF_MATCH],
        body=json(Deployment),
        example={
            "versions": {"policy": "latest", "n": 2},
            "aliases": {"production": 3},
            "traffic": {"3": 0.9, "4": 0.1},
        },
        answer=json(Deployment),
    ),
    Operation(
        method="patch",
        path="/v1/models/{name}/deployment",
        tag="models",
        summary="Change some of how a model is served",
        description="Fields that are given replace what there is, null by the default; of aliases and traffic the "
        "entries that are given, null removes one.",
        parameters=[NAME, IF_MATCH],
        body={"application/json": {"type": "object"}},
        example={"traffic": {"4": 0.5, "3": 0.5}},
        answer=json(Deployment),
    ),
    Operation(
        method="put",
        path="/v1/models/{name}/aliases/{alias}",
        tag="models",
        summary="Let an alias mean a version",
        description='Requests to "name@alias" get that version from the answer on. It is loaded first; 404 where it is '
        "not published, 409 where it does not load or where the alias means another version than `expected`.",
        parameters=[NAME, ALIAS, IF_MATCH],
        body=json(AliasRequest),
        example={"version": 3, "expected": 2},
        answer=json(AliasObject),
    ),
    Operation(
        method="delete",
        path="/v1/models/{name}/aliases/{alias}",
        tag="models",
        summary="Remove an alias",
        parameters=[NAME, ALIAS, IF_MATCH],
        answer=json(AliasObject),
    ),
    Operation(
        method="get",
        path="/v2",
        tag="inference protocol",
        summary="Who answers, and which extensions of the Open Inference Protocol",
        answer=json(ServerMetadata),
    ),
    Operation(
        method="get",
        path="/v2/health/live",
        tag="inference protocol",
        summary="The process answers",
        answer=json(Live),
    ),
    Operation(
        method="get",
        path="/v2/health/ready",
        tag="inference protocol",
        summary="Requests may be sent here; 503 once the server is stopping",
        answer=json(Ready),
    ),
    *of_model(
        "get",
        "",
        summary="The tensors of a model",
        description="Its graph's inputs and outputs; -1 is a size that the client chooses. A text model also takes the "
        "BYTES input `text`, and an image model `image`, files, instead of them. An attention_mask may be left out "
        "where nothing is padding.",
        answer=json(ModelMetadata),
    ),
    *of_model("get", "/ready", summary="Whether a model may be asked; 404 where not", answer=json(Readiness)),
    *of_model("get", "/config", summary="How a model is served, in Triton's words", answer=json(ModelConfig)),
    *of_model(
        "post",
        "/infer",
        summary="Ask a model for its tensors",
        description="JSON, or JSON and behind it the tensors in binary, little-endian, row by row: then "
        "Inference-Header-Content-Length is the length of the JSON, and each such input has the parameter "
        "binary_data_size. Where that header is 0 the whole body is the one input. Outputs come in JSON, or in binary "
        "where binary_data or binary_data_output ask for it.",
        parameters=[
            TIMEOUT,
            PRIORITY,
            parameter(
                "Inference-Header-Content-Length",
                "header",
                {"type": "integer", "minimum": 0},
                "bytes of JSON at the beginning of the body",
            ),
            parameter("Content-Encoding", "header", {"enum": ["identity", "gzip", "deflate"]}, "of the body"),
        ],
        body={"application/json": InferRequest, "application/octet-stream": BINARY},
        example={"inputs": [{"name": "vector", "shape": [1, 2], "datatype": "FP32", "data": [0.2, 1.5]}]},
        answer={"application/json": InferResponse, "application/octet-stream": BINARY},
    ),
    Operation(
        method="get",
        path="/v2/models/stats",
        tag="inference protocol",
        summary="Counts and durations of all loaded models since the server started",
        answer=json(Statistics),
    ),
    *of_model("get", "/stats", summary="The same of one model", answer=json(Statistics)),
    Operation(
        method="post",
        path="/v2/repository/index",
        tag="inference protocol",
        summary="What is in the repository, loaded or not",
        body=json(IndexRequest),
        body_required=False,
        example={"ready": True},
        answer=json(list[IndexEntry]),
    ),
    Operation(
        method="post",
        path="/v2/repository/models/{model}/load",
        tag="inference protocol",
        summary="Load a model, or its newest version",
        description="Answered when it is ready. The parameters of Triton's that say how are refused: a model is loaded "
        "as it was published, and its deployment says how it is served.",
        parameters=[MODEL_NAME],
        body=json(LoadRequest),
        body_required=False,
        answer=json(Done),
    ),
    Operation(
        method="post",
        path="/v2/repository/models/{model}/unload",
        tag="inference protocol",
        summary="Serve a model no more, until it is loaded again",
        description="Answered when the requests that it had are.",
        parameters=[MODEL_NAME],
        body=json(UnloadRequest),
        body_required=False,
        answer=json(Done),
    ),
    Operation(
        method="get",
        path="/health/live",
        tag="health",
        summary="The process answers",
        answer=json(Health),
    ),
    Operation(
        method="get",
        path="/health/ready",
        tag="health",
        summary="Requests may be sent here; 503 once the server is stopping",
        answer=json(Health),
    ),
    Operation(
        method="get",
        path="/metrics",
        tag="health",
        summary="Metrics in Prometheus's format",
        answer={"text/plain": TEXT, "application/openmetrics-text": TEXT},
    ),
)


@cache
def document() -> bytes:
    """The whole document as JSON."""
    kinds = [kind for operation in OPERATIONS for kind in (*operation.body.values(), *operation.answer.values())]
    structs = [ErrorBody, ProtocolError, *(kind for kind in kinds if not isinstance(kind, dict))]
    references, schemas = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    of_struct = dict(zip(structs, references, strict=True))

    def content(media: dict[str, Any], example: Any = None) -> Json:
        shown = {} if example is None else {"example": example}
        return {
            name: {"schema": kind if isinstance(kind, dict) else of_struct[kind], **shown}
            for name, kind in media.items()
        }

    paths: dict[str, Json] = {}
    for operation in OPERATIONS:
        body = ProtocolError if speaks_protocol(operation.path) else ErrorBody
        error = {"description": "What is wrong", "content": content(json(body))}
        described: Json = {
            "tags": [operation.tag],
            "operationId": re.sub(r"\W+", "_", f"{operation.method}{operation.path}").strip("_"),
            "summary": operation.summary,
            "description": operation.description,
            "parameters": operation.parameters,
            "responses": {"200": {"description": "Done", "content": content(operation.answer)}, "default": error},
        }
        if needed := scopes_for(operation.method.upper(), operation.path):
            described["security"] = [{}, {"key": [scope for scope in Scope if scope in needed]}]
            described["responses"] |= {"401": error, "403": error, "429": error}
        if operation.body:
            described["requestBody"] = {
                "required": operation.body_required,
                "content": content(operation.body, operation.example),
            }
        paths.setdefault(operation.path, {})[operation.method] = described
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "Espalier", "version": VERSION, "description": WORDS},
            "paths": paths,
            "components": {"schemas": schemas, "securitySchemes": {"key": KEY}},
        }
    )
