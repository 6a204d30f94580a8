"""BentoML: adaptive batching for JSON, which its validation reads as arrays; raw bytes, which that cannot read, come to
an application mounted in the service."""

from typing import Annotated

import bentoml
import numpy as np
import orjson
from bentoml.validators import Shape
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from benchmarks.peers.servers.graph import KIND, SETTINGS, from_bytes, run, session

Rows = np.ndarray if KIND.input == "input_ids" else Annotated[np.ndarray, Shape((-1, *KIND.shape))]


async def plain(request: Request) -> Response:
    """JSON without batches and validation."""
    return answer(np.asarray(orjson.loads(await request.body())["input"], KIND.dtype))


async def binary(request: Request) -> Response:
    return answer(from_bytes(await request.body()))


def answer(row: np.ndarray) -> Response:
    found = run(bentoml.get_current_service().session, row[None])[0]
    return Response(orjson.dumps({"output": found}, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


routes = [Route("/plain", plain, methods=["POST"]), Route("/binary", binary, methods=["POST"])]


@bentoml.asgi_app(Starlette(routes=routes), path="/")
@bentoml.service(workers=SETTINGS.get("workers", 1), traffic={"timeout": 60, "max_concurrency": 1024})
class Service:
    def __init__(self) -> None:
        self.session = session()

    @bentoml.api(
        batchable=True,
        max_batch_size=max(SETTINGS.get("batch", 32), 2),
        max_latency_ms=SETTINGS.get("latency_ms", 60_000),
    )
    def json(self, input: Rows) -> np.ndarray:
        return run(self.session, np.asarray(input, KIND.dtype))
