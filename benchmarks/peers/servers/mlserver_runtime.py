"""MLServer: a runtime of one's own. It takes v2 JSON, through its NumPy codec; it has no binary tensors over HTTP
(github.com/SeldonIO/MLServer/issues/324), so that bytes come to a custom handler, or as base64 in JSON."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from fastapi import Request, Response
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.handlers import custom_handler
from mlserver.types import InferenceRequest, InferenceResponse

from benchmarks.peers.servers.graph import KIND, SETTINGS, from_bytes, run, session


class Runtime(MLModel):
    """Large networks run on threads, one a core: its parallel workers, processes, cost more, and have no custom
    handlers."""

    async def load(self) -> bool:
        self.session = session()
        self.threads = ThreadPoolExecutor(SETTINGS["pool"]) if SETTINGS["pool"] else None
        return True

    async def run(self, rows: np.ndarray) -> np.ndarray:
        if self.threads is None:
            return run(self.session, rows)
        return await asyncio.get_running_loop().run_in_executor(self.threads, run, self.session, rows)

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        given = payload.inputs[0]
        if given.datatype == "BYTES":
            rows = np.stack([from_bytes(one) for one in self.decode(given)])
        else:
            rows = NumpyCodec.decode_input(given).astype(KIND.dtype, copy=False)
        found = await self.run(rows)
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("output", found)])

    @custom_handler(rest_path="/binary")
    async def binary(self, request: Request) -> Response:
        found = await self.run(from_bytes(await request.body())[None])
        return Response(found.tobytes(), media_type="application/octet-stream")
