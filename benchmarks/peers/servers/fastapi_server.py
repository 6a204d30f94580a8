"""FastAPI, written by hand: the body is read and answered with orjson (its documented ORJSONResponse, without the
validation in between), and the graph runs in the request's coroutine: a thread for it costs more than it gives."""

import numpy as np
import orjson
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

from benchmarks.peers.servers.graph import KIND, SETTINGS, from_bytes, run, session

app = FastAPI()
model = session()


async def answer(row: np.ndarray) -> Response:
    batch = row[None]
    found = await run_in_threadpool(run, model, batch) if SETTINGS["threadpool"] else run(model, batch)
    return Response(
        orjson.dumps({"output": found[0]}, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json"
    )


@app.get("/ready")
async def ready() -> str:
    return "ready"


@app.post("/json")
async def from_json(request: Request) -> Response:
    return await answer(np.asarray(orjson.loads(await request.body())["input"], KIND.dtype))


@app.post("/binary")
async def from_binary(request: Request) -> Response:
    return await answer(from_bytes(await request.body()))
