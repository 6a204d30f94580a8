"""Which scopes open which route.

Open to all: what says whether the server lives, and what describes it, which is the same for every server of a version.
Any other address needs a scope; one that nobody has thought of here needs admin.
"""

from __future__ import annotations

from server.keys import Scope

INFER = frozenset({Scope.INFER, Scope.ADMIN})
TRAIN = frozenset({Scope.TRAIN, Scope.ADMIN})
EITHER = INFER | TRAIN
METRICS = frozenset({Scope.METRICS, Scope.ADMIN})
ADMIN = frozenset({Scope.ADMIN})

EXACT: dict[str, frozenset[Scope] | None] = {
    "/": None,
    "/docs": None,
    "/openapi.json": None,
    "/health/live": None,
    "/health/ready": None,
    "/v2/health/live": None,
    "/v2/health/ready": None,
    "/metrics": METRICS,
    "/v1/classify": INFER,
    "/v1/predict": INFER,
    "/v1/embeddings": INFER,
    "/v1/completions": INFER,
    "/v1/chat/completions": INFER,
    "/v1/tokenize": INFER,
    "/v1/detokenize": INFER,
    "/v1/images/generations": INFER,
    "/v1/models": EITHER,
    "/v2": INFER,
    "/v2/repository/index": INFER,
    # gRPC: /package.Service/Method
    "/grpc.health.v1.Health/Check": None,
    "/grpc.health.v1.Health/Watch": None,
    "/inference.GRPCInferenceService/ServerLive": None,
    "/inference.GRPCInferenceService/ServerReady": None,
    **{
        f"/inference.GRPCInferenceService/{method}": INFER
        for method in (
            *("ModelReady", "ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStatistics"),
            *("ModelInfer", "ModelStreamInfer", "RepositoryIndex"),
        )
    },
}
READING = ("GET", "HEAD", "OPTIONS")


def scopes_for(method: str, path: str) -> frozenset[Scope] | None:
    """The scopes of which a key needs one; None: nobody needs a key."""
    if path in EXACT:
        return EXACT[path]
    path = path.rstrip("/")  # the router takes it for the same address
    if path in EXACT:
        return EXACT[path]
    if path.startswith("/v2/models/"):
        return INFER
    if path == "/v1/files" or path.startswith(("/v1/files/", "/v1/fine_tuning/")):
        return TRAIN
    if method in READING and path.startswith("/v1/models/") and not path.endswith(("/deployment", "/aliases")):
        return EITHER
    return ADMIN
