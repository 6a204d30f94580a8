"""LitServe: batches are made by its queue, in front of so many workers."""

from typing import Annotated, Any

import litserve
import numpy as np
import orjson
from fastapi import Depends, Request, Response

from benchmarks.peers.servers.graph import KIND, SETTINGS, from_bytes, run_rows, session


async def body(request: Request) -> bytes:
    return await request.body()


class Api(litserve.LitAPI):
    """Both forms come as bytes: its own way, request.json() and lists through a queue, is slower."""

    def setup(self, device: str) -> None:
        self.session = session()

    def decode_request(self, request: Annotated[bytes, Depends(body)]) -> Any:
        return self.decode(request)

    def decode(self, content: bytes) -> Any:
        return np.asarray(orjson.loads(content)["input"], KIND.dtype)

    def batch(self, inputs: list[Any]) -> Any:
        return inputs

    def predict(self, rows: Any) -> Any:
        return run_rows(self.session, rows) if self.max_batch_size > 1 else run_rows(self.session, [rows])[0]

    def unbatch(self, output: Any) -> Any:
        return list(output)

    def encode_response(self, output: np.ndarray) -> Response:
        content = orjson.dumps({"output": output}, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(content, media_type="application/json")


class Binary(Api):
    def decode(self, content: bytes) -> Any:
        return from_bytes(content)


if __name__ == "__main__":
    batching = {"max_batch_size": SETTINGS["batch"], "batch_timeout": SETTINGS["delay_ms"] / 1e3}
    apis = [Binary(api_path="/binary", **batching)]
    if not KIND.winner:  # pixels never come as JSON
        apis.append(Api(api_path="/json", **batching))
    server = litserve.LitServer(
        apis, accelerator="cpu", workers_per_device=SETTINGS["workers"], fast_queue=SETTINGS["fast_queue"], timeout=60
    )
    server.run(
        host="127.0.0.1",
        port=SETTINGS["port"],
        num_api_servers=SETTINGS["api_servers"],
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )
