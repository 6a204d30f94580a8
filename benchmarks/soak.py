"""A mixed load for a long time: python -m benchmarks.soak [--minutes 10]

Vectors, images and texts, in every form, by clients that stay, that come anew and that break off; requests that are
wrong in every way; hot swaps; scrapes. Against `espalier serve` with an MLP, EfficientNet-Lite0 and MiniLM. Every
answer is checked. Prints resident memory, open files and threads each half minute. Ends with status 1 when memory has
grown by 2 % or more since the first minute, a file was left open, or an answer was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
import numpy as np
import psutil
import uvloop
from PIL import Image
from rich.console import Console

from benchmarks.generation.contenders import listening
from export.bundle import Manifest, read_manifest, versions
from export.processing.inputs import ImageInput, TextInput, VectorInput
from export.publish import publish
from export.staging import staging

SETTLED_SECONDS = 60.0
PRINTED_SECONDS = 30.0
MOST_GROWTH = 0.02
# Files that may be open at the end beyond those of the first minute: log, database, a folder that is just looked at.
MOST_FILES = 8
CONNECTIONS = 16
OCTETS = "application/octet-stream"
WORDS = (
    "the",
    "cat",
    "and",
    "dog",
    "of",
    "a",
    "house",
    "in",
    "garden",
    "sleeps",
    "when",
    "rain",
    "falls",
    "on",
    "leaves",
)


Right = Callable[[int, bytes], bool]


class Asked(NamedTuple):
    """message: the bytes of a request. right: whether status and body are as they must be; None: the client is gone
    before it could know."""

    message: bytes
    right: Right | None


class Kind(NamedTuple):
    """Requests of one kind. weight: how often among all."""

    name: str
    weight: float
    make: Callable[[random.Random], Asked]


class Sample(msgspec.Struct, frozen=True):
    """Of all processes of the server: resident bytes, open files, threads."""

    seconds: float
    memory: int
    files: int
    threads: int


@dataclass
class Soak:
    """What is done, and what came of it. settled: seconds until memory is first looked at. swapped: seconds from one
    hot swap to the next. asked: requests by kind. problems: in words, by how often; empty when all is well."""

    port: int
    process: int
    repository: Path
    seconds: float
    settled: float = SETTLED_SECONDS
    swapped: float = 20.0
    connections: int = CONNECTIONS
    most_growth: float = MOST_GROWTH
    asked: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    swaps: int = 0

    def window(self, first: bool) -> list[Sample]:
        """The samples that the beginning, or the end, is judged by."""
        width = max(self.seconds / 10, 1.0)
        start = self.settled if first else self.seconds - width
        return [one for one in self.samples if start <= one.seconds <= start + width]

    def growth(self) -> float:
        """Of memory, from when it has settled to the end, as a share. Lower quartiles: during a swap, and until the
        last request is answered, a model is there twice."""
        before, after = (np.percentile([one.memory for one in self.window(first)], 25) for first in (True, False))
        return float(after / before - 1)

    def verdict(self) -> list[str]:
        """What is wrong, in words."""
        found = [f"{count} times: {problem}" for problem, count in self.problems.most_common()]
        if (growth := self.growth()) >= self.most_growth:
            found.append(f"memory grew by {growth:.1%}; less than {self.most_growth:.0%} is the aim")
        before, after = (min(one.files for one in self.window(first)) for first in (True, False))
        if after > before + MOST_FILES:
            found.append(f"{after} files are open, and {before} were")
        if not self.swaps:
            found.append("no model was swapped")
        return found


def post(path: str, kind: str, body: bytes, *, more: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode()


def as_json(path: str, content: object) -> bytes:
    return post(path, "application/json", json.dumps(content).encode())


def refused(status: int) -> Right:
    return lambda found, body: found == status and b"error" in body


def fine(status: int, body: bytes) -> bool:
    return status == 200


def told(labels: Sequence[str]) -> Right:
    """Of as many inputs."""
    return lambda status, body: status == 200 and [one["label"] for one in json.loads(body)["data"]] == labels


def of_length(count: int) -> Right:
    return lambda status, body: status == 200 and len(json.loads(body)["data"]) == count


def always(message: bytes, right: Right | None) -> Callable[[random.Random], Asked]:
    asked = Asked(message, right)
    return lambda chance: asked


def one_of(all_asked: Sequence[Asked]) -> Callable[[random.Random], Asked]:
    return lambda chance: chance.choice(all_asked)


def vector_kinds(manifest: Manifest, features: int, labels: list[str], v2: bool) -> list[Kind]:
    """labels: what `vectors(features)` are, in their order."""
    name, given = manifest.name, vectors(features)
    path, text = f"/v1/classify?model={name}", given.tolist()
    each = list(zip(text, given, labels, strict=True))
    whole = as_json("/v1/classify", {"model": name, "input": text})
    half = as_json("/v1/classify", {"model": name, "input": text[0][: features // 2]})
    in_json = [Asked(as_json("/v1/classify", {"model": name, "input": row}), told([label])) for row, _, label in each]
    in_bytes = [Asked(post(path, OCTETS, row.tobytes()), told([label])) for _, row, label in each]
    kinds = [
        Kind("vector, JSON", 24, one_of(in_json)),
        Kind("vector, bytes", 16, one_of(in_bytes)),
        Kind("several vectors", 4, always(whole, told(labels))),
        Kind("several vectors, bytes", 4, always(post(path, OCTETS, given.tobytes()), told(labels))),
        Kind("too short a vector", 1, always(half, refused(400))),
        Kind("broken off in the body", 1, lambda chance: Asked(whole[: chance.randrange(1, len(whole))], None)),
        Kind("broken off while it waits", 1, always(whole, None)),
    ]
    if v2:
        path = f"/v2/models/{name}/infer"
        tensor = {"name": manifest.inputs[0].name, "shape": [1, features], "datatype": "FP32"}
        head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": 4 * features}}]}).encode()
        length = f"inference-header-content-length: {len(head)}\r\n"
        binary = post(path, OCTETS, head + given[0].tobytes(), more=length)
        wrong = as_json(path, {"inputs": [{**tensor, "shape": [2, features], "data": text[0]}]})
        kinds += [
            Kind("v2, JSON", 4, always(as_json(path, {"inputs": [{**tensor, "data": text[0]}]}), fine)),
            Kind("v2, bytes", 4, always(binary, fine)),
            Kind("v2, wrong shape", 1, always(wrong, refused(400))),
        ]
    return kinds


def vectors(features: int) -> np.ndarray:
    """float32 [8, features]."""
    return np.random.default_rng(0).normal(size=(8, features)).astype(np.float32)


def image_kinds(manifest: Manifest, spec: ImageInput) -> list[Kind]:
    pixels = np.random.default_rng(0).integers(0, 256, (spec.height, spec.width, spec.channels), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((2 * spec.width, 2 * spec.height)).save(file, "JPEG")
    jpeg, path = file.getvalue(), f"/v1/classify?model={manifest.name}"
    form = (
        b'--edge\r\ncontent-disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n' + jpeg + b"\r\n--edge--\r\n"
    )
    return [
        Kind("image, pixels", 1, always(post(path, OCTETS, pixels.tobytes()), of_length(1))),
        Kind("image, JPEG", 1, always(post(path, "image/jpeg", jpeg), of_length(1))),
        Kind("image, form", 1, always(post(path, "multipart/form-data; boundary=edge", form), of_length(1))),
        Kind("image, cut off", 1, always(post(path, "image/jpeg", jpeg[: len(jpeg) // 3]), refused(400))),
    ]


def text_kinds(manifest: Manifest, spec: TextInput) -> list[Kind]:
    """Texts of all lengths."""
    path = "/v1/embeddings"

    def asked(chance: random.Random, count: int) -> Asked:
        texts = [" ".join(chance.choices(WORDS, k=chance.randrange(1, spec.max_length // 2))) for _ in range(count)]
        return Asked(as_json(path, {"model": manifest.name, "input": texts}), of_length(count))

    unknown = as_json(path, {"model": manifest.name, "input": [10**9]})
    return [
        Kind("text", 4, lambda chance: asked(chance, 1)),
        Kind("texts", 1, lambda chance: asked(chance, chance.randrange(2, 6))),
        Kind("unknown token", 0.5, always(unknown, refused(400))),
    ]


def other_kinds() -> list[Kind]:
    nobody = as_json("/v1/classify", {"model": "nobody", "input": [1.0]})
    return [
        Kind("not JSON", 0.5, always(post("/v1/classify", "application/json", b'{"model": "'), refused(400))),
        Kind("unknown model", 0.5, always(nobody, refused(404))),
        Kind("unknown path", 0.5, lambda chance: Asked(get(f"/v1/{chance.random()}"), refused(404))),
        Kind("wrong method", 0.5, always(get("/v1/classify"), refused(405))),
        Kind("models", 0.5, always(get("/v1/models"), fine)),
        Kind("ready", 0.5, always(get("/health/ready"), fine)),
        Kind("metrics", 0.2, always(get("/metrics"), fine)),
    ]


async def kinds(run: Soak) -> list[Kind]:
    """For the models in the repository."""
    made = other_kinds()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{run.port}", timeout=60) as client:
        v2 = (await client.get("/v2/health/live")).status_code == 200
        for name in names(run.repository):
            manifest = newest(run.repository, name)
            match manifest.input:
                case VectorInput(features=features):
                    asked = {"model": name, "input": vectors(features).tolist()}
                    told = (await client.post("/v1/classify", json=asked)).raise_for_status().json()
                    made += vector_kinds(manifest, features, [one["label"] for one in told["data"]], v2)
                case ImageInput():
                    made += image_kinds(manifest, manifest.input)
                case TextInput():
                    made += text_kinds(manifest, manifest.input)
    return made


def names(repository: Path) -> list[str]:
    return sorted(path.name for path in repository.iterdir() if versions(repository, path.name))


def newest(repository: Path, name: str) -> Manifest:
    return read_manifest(repository / name / str(max(versions(repository, name))))


class Connection:
    """One request after the other over one socket."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.writer: asyncio.StreamWriter | None = None

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self.reader, self.writer

    async def ask(self, message: bytes) -> tuple[int, bytes]:
        """Status and body. Raises OSError and EOFError where the server hangs up."""
        reader, writer = await self.open()
        writer.write(message)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
        if b"connection: close" in head.lower():
            self.close()
        return int(head[9:12]), body

    async def break_off(self, message: bytes) -> None:
        """Send it, and be gone before an answer can have come."""
        _, writer = await self.open()
        writer.write(message)
        await asyncio.sleep(0.001)
        writer.transport.abort()
        self.writer = None

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


async def client(run: Soak, all_kinds: Sequence[Kind], chance: random.Random, until: float) -> None:
    connection = Connection(run.port)
    weights = [kind.weight for kind in all_kinds]
    while time.monotonic() < until:
        (kind,) = chance.choices(all_kinds, weights)
        run.asked[kind.name] += 1
        message, right = kind.make(chance)
        try:
            if right is None:
                await connection.break_off(message)
                continue
            status, body = await asyncio.wait_for(connection.ask(message), 60)
            if not right(status, body):
                run.problems[f"{kind.name}: answered with {status} {body[:200]!r}"] += 1
        except (OSError, EOFError, TimeoutError, ValueError, KeyError) as error:
            run.problems[f"{kind.name}: {error!r}"] += 1
            connection.close()
        if chance.random() < 0.01:  # comes anew
            connection.close()
    connection.close()


async def watch(run: Soak, until: float, say: Callable[[str], None]) -> None:
    """A sample a second."""
    start, spoken = time.monotonic(), 0.0
    while (now := time.monotonic()) < until:
        run.samples.append(sample(run.process, now - start))
        one = run.samples[-1]
        if one.seconds >= spoken:
            say(
                f"{one.seconds:5.0f} s  {one.memory / 2**20:8.1f} MiB  {one.files:4} files  {one.threads:3} threads  "
                f"{sum(run.asked.values()):9,} requests  {run.swaps:3} swaps  {sum(run.problems.values())} problems"
            )
            spoken += PRINTED_SECONDS
        await asyncio.sleep(1.0)


def sample(process: int, seconds: float) -> Sample:
    memory = files = threads = 0
    top = psutil.Process(process)
    for one in [top, *top.children(recursive=True)]:
        with suppress(psutil.Error):
            memory += one.memory_info().rss
            files += one.num_fds()
            threads += one.num_threads()
    return Sample(seconds, memory, files, threads)


async def swap(run: Soak, until: float) -> None:
    """Publish one model after the other anew, and remove what is no longer served."""
    place = 0
    while time.monotonic() + run.swapped < until:
        await asyncio.sleep(run.swapped)
        chosen = names(run.repository)[place % len(names(run.repository))]
        place += 1
        published = await asyncio.to_thread(anew, run.repository, chosen)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{run.port}", timeout=60) as client:
            for _ in range(600):
                served = (await client.get(f"/v1/models/{chosen}")).json()
                if served.get("version") == published.version:
                    break
                await asyncio.sleep(0.1)
            else:
                run.problems[f"{chosen}: a new version is not served after a minute"] += 1
        run.swaps += 1
        for version in versions(run.repository, chosen):
            if version < published.version - 1:
                shutil.rmtree(run.repository / chosen / str(version))


def anew(repository: Path, name: str) -> Manifest:
    """The newest version, once more."""
    manifest = newest(repository, name)
    with staging(repository) as folder:
        for file in manifest.files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            os.link(repository / name / str(manifest.version) / file, folder / file)
        return publish(folder, repository, manifest)


async def soak(run: Soak, say: Callable[[str], None]) -> None:
    all_kinds = await kinds(run)
    until = time.monotonic() + run.seconds
    clients = [client(run, all_kinds, random.Random(seed), until) for seed in range(run.connections)]
    await asyncio.gather(watch(run, until, say), swap(run, until), *clients)


def main() -> None:
    from benchmarks.peers.folder import KEPT
    from benchmarks.peers.models import MODELS
    from benchmarks.peers.models import publish as publish_models

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--folder", type=Path, default=KEPT, help="where the models are kept")
    options = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False)
    publish_models(options.folder / "models", MODELS, console.print)
    seconds = 60 * options.minutes
    with tempfile.TemporaryDirectory() as home:
        repository = Path(home) / "repository"
        shutil.copytree(options.folder / "models", repository)
        flags = ["--home", home, "--repository", str(repository), "--no-worker"]
        with listening([sys.executable, "-m", "server", *flags], "/health/ready") as port:
            run = Soak(port, server_of(port), repository, seconds, settled=min(SETTLED_SECONDS, seconds / 3))
            uvloop.run(soak(run, console.print))
    for name, count in run.asked.most_common():
        console.print(f"{count:9,}  {name}")
    console.print(f"memory grew by {run.growth():.2%} from second {run.settled:.0f} on; {run.swaps} hot swaps")
    problems = run.verdict()
    for problem in problems:
        console.print(problem, markup=False)
    console.print("[red]not well" if problems else "every answer was right, memory is flat")
    sys.exit(bool(problems))


def server_of(port: int) -> int:
    """The process that listens there, among those started here."""
    for child in psutil.Process().children():
        if any(found.laddr.port == port for found in child.net_connections() if found.status == psutil.CONN_LISTEN):
            return int(child.pid)
    raise ProcessLookupError(f"no process of ours listens on port {port}")


if __name__ == "__main__":
    main()
