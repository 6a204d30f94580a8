"""The whole story over HTTP: fine-tune a CNN on digits and a Transformer on languages, then ask both.

Run: make demo
"""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from demo import client as api
from demo import datasets, server_process, show

FOLDER = Path("demo-data")

DIGITS: dict[str, Any] = {
    "model": "efficientnet-lite0",
    "name": "digits",
    "seed": 1,
    "image_size": 64,
    "hyperparameters": {"n_epochs": 3, "batch_size": 32, "learning_rate": 1e-3},
}
LANGUAGES: dict[str, Any] = {
    "model": "minilm-l6-v2",
    "name": "languages",
    "seed": 1,
    "max_length": 48,
    "hyperparameters": {"n_epochs": 3, "batch_size": 32, "learning_rate": 3e-4},
}


def fine_tune(client: httpx.Client, console: Console, path: Path, recipe: dict[str, Any]) -> None:
    """Upload, say what the validation found, train with progress, wait until the result is served."""
    console.print(f"uploading {path.name} ({path.stat().st_size / 1e6:.1f} MB)")
    file = api.upload(client, path)
    report = file["report"]
    console.print(
        f"  [dim]{file['id']}: {report['items']} items, {len(report['classes'])} classes,"
        f" {len(report['problems'])} problems, {len(report['duplicates'])} duplicates"
    )
    job = api.fine_tune(client, {**recipe, "training_file": file["id"]}, console)
    name, _, version = job["fine_tuned_model"].partition(":")
    api.wait_until_served(client, name, int(version))
    console.print(f"  [green]served as {job['fine_tuned_model']}")


def main() -> None:
    console = Console()
    started = time.monotonic()
    url = f"http://127.0.0.1:{os.environ.get('ESPALIER_PORT', '8000')}"
    pid = server_process.start(url, FOLDER / "server.log")
    console.print(f"server at {url}, " + (f"pid {pid}" if pid else "which was running already"))
    with httpx.Client(base_url=url, timeout=60) as client:
        console.rule("1. EfficientNet-Lite0 learns handwritten digits")
        digits_zip, digits_held_out = datasets.digits(FOLDER)
        fine_tune(client, console, digits_zip, DIGITS)

        console.rule("2. MiniLM learns to tell languages apart")
        languages_csv, languages_held_out = datasets.languages(FOLDER)
        fine_tune(client, console, languages_csv, LANGUAGES)

        console.rule("3. Both answer over HTTP")
        answers, seconds = api.classify_all(
            lambda png: client.post("/v1/classify?model=digits", content=png, headers={"content-type": "image/png"}),
            [png for png, _ in digits_held_out],
        )
        show.results(console, "digits", answers, [label for _, label in digits_held_out], seconds)
        answers, seconds = api.classify_all(
            lambda text: client.post("/v1/classify", json={"model": "languages", "input": text}),
            [text for text, _ in languages_held_out],
        )
        show.results(console, "languages", answers, [label for _, label in languages_held_out], seconds)

    sample = FOLDER / "sample.png"
    sample.write_bytes(digits_held_out[0][0])
    sentence = {"model": "languages", "input": "Il gatto dorme sul tavolo della cucina.", "top_k": 3}
    embedded = {"model": "languages", "input": sentence["input"]}
    console.rule(f"all of it took {time.monotonic() - started:.0f} s; go on with")
    for command in (
        f"curl -s '{url}/v1/classify?model=digits&top_k=3' -H 'content-type: image/png' --data-binary @{sample}",
        f"curl -s {url}/v1/classify -H 'content-type: application/json' -d {shlex.quote(json.dumps(sentence))}",
        f"curl -s {url}/v1/embeddings -H 'content-type: application/json' -d {shlex.quote(json.dumps(embedded))}",
        f"curl -s {url}/v1/models",
        f"curl -s {url}/metrics | grep ^espalier_",
    ):
        console.print(command, soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"The API is described at {url}/docs. The server goes on running" + (f"; kill {pid} ends it." if pid else ".")
    )


if __name__ == "__main__":
    main()
