"""MLServer: a runtime of one's own. It takes v2 JSON, through its NumPy codec; it has no binary tensors over HTTP
(github.com/SeldonIO/MLServer/issues/324), so that bytes come to a custom handler, or as base64 in JSON."""

import numpy as np
from fastapi import Request, Response
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.handlers import custom_handler
from mlserver.types import InferenceRequest, InferenceResponse

from benchmarks.peers.servers.graph import KIND, from_bytes, run, session


class Runtime(MLModel):
    async def load(self) -> bool:
        self.session = session()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        given = payload.inputs[0]
        if given.datatype == "BYTES":
            rows = np.stack([from_bytes(one) for one in self.decode(given)])
        else:
            rows = NumpyCodec.decode_input(given).astype(KIND.dtype, copy=False)
        found = run(self.session, rows)
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("output", found)])

    @custom_handler(rest_path="/binary")
    async def binary(self, request: Request) -> Response:
        found = run(self.session, from_bytes(await request.body())[None])
        return Response(found.tobytes(), media_type="application/octet-stream")
