"""Ray Serve: replicas that make batches of what HAProxy hands them."""

import asyncio
import signal

import numpy as np
import orjson
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.peers.servers.graph import KIND, SETTINGS, from_bytes, run, run_rows, session


class Model:
    def __init__(self) -> None:
        self.session = session()

    @serve.batch(max_batch_size=SETTINGS["batch"], batch_wait_timeout_s=SETTINGS["delay_ms"] / 1e3)
    async def together(self, rows: list[np.ndarray]) -> list[np.ndarray]:
        return list(run_rows(self.session, rows))

    async def __call__(self, request: Request) -> Response:
        content = await request.body()
        if request.url.path == "/binary":
            row = from_bytes(content)
        else:
            row = np.asarray(orjson.loads(content)["input"], KIND.dtype)
        found = await self.together(row) if SETTINGS["batch"] > 1 else run(self.session, row[None])[0]
        return Response(
            orjson.dumps({"output": found}, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json"
        )


async def ended() -> None:
    end = asyncio.Event()
    for one in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(one, end.set)
    await end.wait()


if __name__ == "__main__":
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    serve.start(http_options={"host": "127.0.0.1", "port": SETTINGS["port"]}, proxy_location="HeadOnly")
    options = {
        "num_replicas": SETTINGS["workers"],
        "max_ongoing_requests": 1024,
        "ray_actor_options": {"num_cpus": 0.5},
    }
    serve.run(serve.deployment(Model, **options).bind(), logging_config={"enable_access_log": False})
    asyncio.run(ended())
    serve.shutdown()
    ray.shutdown()
