"""Who is measured: where each comes from, how it is started, asked and understood.

Settings are the best of those that were tried; `python -m benchmarks.peers.tuning` tries them again.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.peers.models import Case, graph, output, sample
from benchmarks.peers.wrk import Request

ROOT = Path(__file__).parents[2]
SERVERS = "benchmarks.peers.servers"
# The one that Espalier itself has.
RUNTIME = "onnxruntime==1.31.1"
OCTETS = {"content-type": "application/octet-stream"}
JSON = {"content-type": "application/json"}
OURS = ("Espalier", "Espalier v2", "Espalier with front-ends")

Settings = Mapping[str, Any]


class Winner(msgspec.Struct, frozen=True):
    """All that is answered of a classification: the likeliest label and its probability."""

    label: int
    probability: float


class Reply(msgspec.Struct, frozen=True):
    headers: Mapping[str, str]
    body: bytes


Answer = np.ndarray | Winner


@dataclass(frozen=True)
class Start:
    """What a server is started with. settings: those of the model. home: an empty folder of its own."""

    python: Path
    model: str
    repository: Path
    port: int
    settings: Settings
    home: Path

    def environment(self) -> dict[str, str]:
        """For `benchmarks.peers.servers.graph`."""
        peer = {"model": self.model, "graph": str(graph(self.repository, self.model)), "port": self.port}
        return {"PEER": json.dumps({**peer, **self.settings})}


@dataclass(frozen=True)
class Contender:
    """packages: of its environment; none: it is ours. settings: by model, of those that it is measured with. words:
    what they are, for the reader. command: with what else the environment must hold. ready: a path that answers 200
    when it can be asked. request, answer: of a case."""

    name: str
    packages: tuple[str, ...]
    words: str
    settings: Mapping[str, Settings]
    command: Callable[[Start], tuple[list[str], dict[str, str]]]
    ready: str
    request: Callable[[Case, Settings], Request]
    answer: Callable[[Case, Reply], Answer]


def numbers(case: Case) -> np.ndarray:
    """One row: float32 [784], uint8 [224, 224, 3] or int64 [tokens]."""
    found: np.ndarray = next(iter(sample(case).values()))[0]
    return found


def compact(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def as_list(case: Case) -> list[float]:
    """As text, numbers have four digits."""
    found: list[float] = numbers(case).ravel().tolist()
    return [round(number, 4) for number in found] if case.model == "mlp" else found


def plain_request(case: Case, settings: Settings) -> Request:
    """Our own small protocol, for frameworks that have none."""
    if case.form == "binary":
        return Request("/binary", OCTETS, numbers(case).tobytes())
    return Request("/json", JSON, compact({"input": as_list(case)}))


def plain_answer(case: Case, reply: Reply) -> Answer:
    return told(case, np.array(json.loads(reply.body)["output"], np.float32))


def told(case: Case, row: np.ndarray) -> Answer:
    if case.model == "efficientnet-lite0" and len(row) == 2:
        return Winner(int(row[0]), float(row[1]))
    return row


def uvicorn(start: Start) -> tuple[list[str], dict[str, str]]:
    flags = ["--port", str(start.port), "--workers", str(start.settings["workers"]), "--no-access-log"]
    flags += ["--loop", "uvloop", "--http", "httptools", "--log-level", "warning"]
    return [str(start.python), "-m", "uvicorn", f"{SERVERS}.fastapi_server:app", *flags], start.environment()


def script(module: str, **environment: str) -> Callable[[Start], tuple[list[str], dict[str, str]]]:
    def command(start: Start) -> tuple[list[str], dict[str, str]]:
        return [str(start.python), "-m", f"{SERVERS}.{module}"], {**start.environment(), **environment}

    return command


def bentoml(start: Start) -> tuple[list[str], dict[str, str]]:
    flags = ["--port", str(start.port), "--host", "127.0.0.1"]
    config = start.home / "bentoml.yaml"
    config.write_text("services: {'*': {logging: {access: {enabled: false}}, metrics: {enabled: false}}}\n")
    quiet = {"BENTOML_HOME": str(start.home), "BENTOML_DO_NOT_TRACK": "True", "BENTOML_CONFIG": str(config)}
    command = [str(start.python), "-m", "bentoml", "serve", f"{SERVERS}.bentoml_service:Service", *flags]
    return command, {**start.environment(), **quiet}


def bentoml_request(case: Case, settings: Settings) -> Request:
    if case.form == "binary":
        return Request("/binary", OCTETS, numbers(case).tobytes())
    if settings["batch"] == 1:
        return Request("/plain", JSON, compact({"input": as_list(case)}))
    return Request("/json", JSON, compact({"input": [as_list(case)]}))


def bentoml_answer(case: Case, reply: Reply) -> Answer:
    found = json.loads(reply.body)
    return told(case, np.array(found["output"] if isinstance(found, dict) else found[0], np.float32))


def mlserver(start: Start) -> tuple[list[str], dict[str, str]]:
    """Reads two files."""
    settings = start.settings
    server = {
        **{"debug": False, "host": "127.0.0.1", "http_port": start.port, "grpc_port": start.port + 1},
        **{"metrics_endpoint": None, "gzip_enabled": False, "parallel_workers": settings["workers"]},
    }
    model: dict[str, Any] = {"name": "model", "implementation": f"{SERVERS}.mlserver_runtime.Runtime"}
    if settings["batch"] > 1:
        model |= {"max_batch_size": settings["batch"], "max_batch_time": settings["delay_ms"] / 1e3}
    (start.home / "settings.json").write_text(json.dumps(server))
    (start.home / "model-settings.json").write_text(json.dumps(model))
    return [str(start.python.parent / "mlserver"), "start", str(start.home)], start.environment()


def mlserver_request(case: Case, settings: Settings) -> Request:
    if case.form == "binary":
        return Request("/binary", OCTETS, numbers(case).tobytes())
    return v2_request("input", case, binary=False)


def mlserver_answer(case: Case, reply: Reply) -> Answer:
    if case.form == "binary":
        return told(case, np.frombuffer(reply.body, np.float32))
    return v2_answer(case, reply)


TYPES = {"float32": "FP32", "uint8": "UINT8", "int64": "INT64"}


def v2_request(name: str, case: Case, *, binary: bool, model: str = "model", wanted: str = "output") -> Request:
    """Of the Open Inference Protocol; binary: with its binary tensors, in the answer, too."""
    row = numbers(case)
    tensor: dict[str, Any] = {"name": name, "shape": [1, *row.shape], "datatype": TYPES[str(row.dtype)]}
    path = f"/v2/models/{model}/infer"
    if not binary:
        return Request(path, JSON, compact({"inputs": [{**tensor, "data": as_list(case)}]}))
    content = row.tobytes()
    tensor["parameters"] = {"binary_data_size": len(content)}
    outputs = [{"name": wanted, "parameters": {"binary_data": True}}]
    head = compact({"inputs": [tensor], "outputs": outputs})
    return Request(path, {**OCTETS, "Inference-Header-Content-Length": str(len(head))}, head + content)


def v2_answer(case: Case, reply: Reply) -> Answer:
    length = reply.headers.get("inference-header-content-length")
    if length is not None:
        return told(case, np.frombuffer(reply.body[int(length) :], np.float32))
    return told(case, np.array(json.loads(reply.body)["outputs"][0]["data"], np.float32).ravel())


def pytriton(start: Start) -> tuple[list[str], dict[str, str]]:
    """Triton embeds a Python of its own, which must be the one whose library it finds."""
    libraries = sysconfig.get_config_var("LIBDIR")
    command = [str(start.python), "-m", f"{SERVERS}.pytriton_server"]
    return command, {**start.environment(), "LD_LIBRARY_PATH": str(libraries)}


def pytriton_request(case: Case, settings: Settings) -> Request:
    return v2_request("input", case, binary=case.form == "binary" or case.tokens > 0)


def espalier(start: Start) -> tuple[list[str], dict[str, str]]:
    flags = ["--home", str(start.home), "--repository", str(start.repository), "--port", str(start.port)]
    for name, value in start.settings.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    return [sys.executable, "-m", "server", *flags, "--no-worker"], {}


def espalier_request(case: Case, settings: Settings) -> Request:
    if case.tokens:
        return Request("/v1/embeddings", JSON, compact({"model": case.model, "input": as_list(case)}))
    if case.form == "binary":
        return Request(f"/v1/classify?model={case.model}&top_k=1", OCTETS, numbers(case).tobytes())
    return Request("/v1/classify", JSON, compact({"model": case.model, "input": as_list(case)}))


def espalier_answer(labels: Callable[[str], list[str]]) -> Callable[[Case, Reply], Answer]:
    def answer(case: Case, reply: Reply) -> Answer:
        found = json.loads(reply.body)["data"][0]
        if case.tokens:
            return np.array(found["embedding"], np.float32)
        return Winner(labels(case.model).index(found["label"]), found["probability"])

    return answer


def espalier_v2_request(case: Case, settings: Settings) -> Request:
    name = next(iter(sample(case)))
    binary = case.form == "binary" or case.tokens > 0
    return v2_request(name, case, binary=binary, model=case.model, wanted=output(case))


def same(settings: Settings, *, large: Settings | None = None) -> dict[str, Settings]:
    """large: what is otherwise for the two networks that a request keeps a core busy with for milliseconds."""
    both = {**settings, **(large or {})}
    return {"mlp": settings, "efficientnet-lite0": both, "minilm-l6-v2": both}


def contenders(repository: Path) -> list[Contender]:
    def labels(model: str) -> list[str]:
        found: list[str] = json.loads((repository / model / "1" / "manifest.json").read_bytes())["labels"]
        return found

    return [
        Contender(
            OURS[0], (), "as it is installed; its own routes", same({}), espalier, "/health/ready",
            espalier_request, espalier_answer(labels),
        ),
        Contender(
            OURS[1], (), "the same server; the Open Inference Protocol", same({}), espalier, "/health/ready",
            espalier_v2_request, v2_answer,
        ),
        Contender(
            OURS[2], (), "two processes that do HTTP for the one that runs the models; its own routes",
            {"mlp": {"frontends": 2}}, espalier, "/health/ready", espalier_request, espalier_answer(labels),
        ),
        Contender(
            "LitServe", ("litserve==0.2.19", "orjson==3.13.0", RUNTIME),
            "request bodies as bytes, orjson",
            same(
                {"batch": 1, "delay_ms": 0, "workers": 1, "threads": 1, "fast_queue": True, "api_servers": 1},
                large={"workers": 2},
            ),
            script("litserve_server"), "/health", plain_request, plain_answer,
        ),
        Contender(
            "BentoML", ("bentoml==1.4.40", "orjson==3.13.0", "uvloop==0.23.0", "httptools==0.9.0", RUNTIME),
            "a mounted application, orjson, no metrics, no access log",
            same({"batch": 1, "workers": 2, "threads": 1}), bentoml, "/readyz", bentoml_request, bentoml_answer,
        ),
        Contender(
            "Ray Serve", ("ray[serve]==2.60.0", "orjson==3.13.0", RUNTIME),
            "HAProxy in front, RAY_SERVE_THROUGHPUT_OPTIMIZED, orjson",
            same({"batch": 64, "delay_ms": 0, "workers": 1, "threads": 1}, large={"batch": 8, "workers": 2}),
            script("ray_server", RAY_SERVE_ENABLE_HA_PROXY="1", RAY_SERVE_THROUGHPUT_OPTIMIZED="1",
                   RAY_USAGE_STATS_ENABLED="0"),
            "/-/healthz", plain_request, plain_answer,
        ),
        Contender(
            "MLServer", ("mlserver==1.7.1", "uvloop==0.21.0", RUNTIME),
            "v2 JSON; bytes to a custom handler; no metrics, no gzip; pool: threads that run the graph",
            same({"batch": 1, "delay_ms": 0, "workers": 0, "threads": 1, "pool": 0}, large={"pool": 2}),
            mlserver, "/v2/models/model/ready", mlserver_request, mlserver_answer,
        ),
        Contender(
            "pytriton", ("nvidia-pytriton==0.7.0", RUNTIME),
            "v2 JSON and binary tensors; no gRPC, no metrics",
            same(
                {"batch": 256, "delay_ms": 0, "workers": 1, "threads": 1, "http_threads": 4},
                large={"batch": 8, "workers": 2},
            ),
            pytriton, "/v2/models/model/ready", pytriton_request, v2_answer,
        ),
        Contender(
            "FastAPI", ("fastapi==0.165.0", "uvicorn[standard]==0.54.0", "orjson==3.13.0", "numpy==2.4.6", RUNTIME),
            "uvloop, httptools, orjson, no access log",
            same({"workers": 2, "threads": 1, "threadpool": False}), uvicorn, "/ready", plain_request, plain_answer,
        ),
    ]  # fmt: skip


def in_words(contender: Contender) -> str:
    """Settings that differ from model to model are said of each."""

    def said(settings: Settings) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())

    kinds = dict.fromkeys(map(said, contender.settings.values()))
    by_model = "; ".join(f"{model}: {said(settings)}" for model, settings in contender.settings.items())
    return "; ".join(filter(None, (contender.words, next(iter(kinds)) if len(kinds) == 1 else by_model)))
