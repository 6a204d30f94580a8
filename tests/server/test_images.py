"""Images from noise over a real socket."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from server.settings import Settings
from tests.server.bundles import publish_generator, publish_vectors
from tests.server.conftest import Live, message_of, running

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = Settings(home=tmp_path_factory.mktemp("home"), port=0, worker=False)
    publish_generator(settings.repository, "greys")
    publish_generator(settings.repository, "coder", beside=True)
    publish_vectors(settings.repository)
    with running(settings) as server:
        yield server


def ask(live: Live, **fields: Any) -> httpx.Response:
    return live.client.post(PATH, json={"model": "greys", **fields})


def colours(response: httpx.Response) -> list[tuple[int, int, int]]:
    """Of each image in the answer; every pixel of it has that one."""
    assert response.status_code == 200, response.text
    found = []
    for item in response.json()["data"]:
        picture = Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (6, 4))
        pixels = np.asarray(picture).reshape(-1, 3)
        assert (pixels == pixels[0]).all()
        found.append(tuple(pixels[0].tolist()))
    return found


@pytest.mark.parametrize("model", ["greys", "coder"])
def test_the_images_of_given_vectors(live: Live, model: str) -> None:
    response = ask(live, model=model, latent=[[0, 1, -1], [9, -9, 0.5]])
    assert colours(response) == [(128, 160, 96), (255, 0, 144)]
    body = response.json()
    assert (body["model"], body["version"], body["seed"]) == (model, 1, None)
    assert (body["size"], body["output_format"]) == ("6x4", "png")


def test_a_seed_makes_the_same_images_however_many_and_whoever_asks_beside(live: Live) -> None:
    alone = colours(ask(live, seed=7))
    many = colours(ask(live, seed=7, n=5))
    assert len(alone) == 1
    assert len(set(many)) == 5
    assert many[:1] == alone
    found: dict[int, list[tuple[int, int, int]]] = {}

    def one(seed: int) -> None:
        found[seed] = colours(ask(live, seed=seed, n=3))

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[7] == many[:3]
    assert len({image for images in found.values() for image in images}) > 40


def test_without_a_seed_the_one_that_was_drawn_is_told(live: Live) -> None:
    first, second = ask(live, n=2), ask(live, n=2)
    assert colours(first) != colours(second)
    assert colours(ask(live, n=2, seed=first.json()["seed"])) == colours(first)


def test_the_latent_numbers_are_standard_normal(live: Live) -> None:
    values = (np.array(colours(ask(live, seed=1, n=128))) - 128.0) / 32.0
    assert abs(values.mean()) < 0.15
    assert abs(values.std() - 1.0) < 0.15


def test_an_interpolation_goes_from_one_image_to_the_other(live: Live) -> None:
    ends = [colours(ask(live, seed=seed))[0] for seed in (3, 4)]
    way = colours(ask(live, interpolation={"from": 3, "to": 4, "steps": 9}))
    assert len(way) == 9
    assert [way[0], way[-1]] == ends
    assert len(set(way)) == 9
    assert way == colours(ask(live, interpolation={"from": 4, "to": 3, "steps": 9}))[::-1]
    quarter = colours(ask(live, interpolation={"from": [3, 0, 0], "to": [0, 3, 0], "steps": 3}))
    assert quarter[1] == (196, 196, 128), "a circle of radius 3, where a line would be at 1.5"


def test_the_client_of_openai_makes_images(live: Live) -> None:
    client = openai.OpenAI(base_url=f"{live.address}/v1", api_key="none", max_retries=0)
    answer = client.images.generate(
        model="greys", prompt="anything", n=2, size="auto", response_format="b64_json", extra_body={"seed": 7}
    )
    assert answer.created > 1_700_000_000
    expected = ask(live, seed=7, n=2).json()["data"]
    assert answer.data is not None
    assert [item.b64_json for item in answer.data] == [item["b64_json"] for item in expected]
    with pytest.raises(openai.BadRequestError, match="images are kept nowhere"):
        client.images.generate(model="greys", prompt="anything", response_format="url")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"model": "points"}, "model", "points does not make images; ask it at /v1/classify or /v1/embeddings"),
        ({"n": 0}, "n", "`int` >= 1"),
        ({"n": 129}, "n", "`int` <= 128"),
        ({"n": "four"}, "n", "Expected `int"),
        ({"size": "1024x1024"}, "size", "makes images of 6x4"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"response_format": "png"}, "response_format", "'png'"),
        ({"output_format": "webp"}, "output_format", "'webp'"),
        ({"stream": True}, "stream", "leave it out"),
        ({"seed": -1}, "seed", ">= 0"),
        ({"seed": 2**64}, "seed", "seed"),
        ({"latent": []}, "latent", "length >= 1"),
        ({"latent": [[]]}, "latent", "length >= 1"),
        ({"latent": [[1, 2, 3], [1, 2]]}, "latent", "latent 1 has 2 numbers; this model takes 3"),
        ({"latent": [[1, 2, 1e39]]}, "latent", "latent 0: every number must be finite"),
        ({"latent": [1, 2, 3]}, "latent", "Expected `array`"),
        ({"latent": [[1, 2, 3]], "n": 2}, "n", "latent asks for 1 images"),
        ({"latent": [[1, 2, 3]], "seed": 1}, "latent", "seed says already which images"),
        ({"seed": 1, "interpolation": {"from": 1, "to": 2}}, "interpolation", "seed says already"),
        ({"interpolation": {"from": 1}}, "interpolation", "`to`"),
        ({"interpolation": {"from": 1, "to": "2"}}, "interpolation", "Expected `int | array`"),
        ({"interpolation": {"from": 1, "to": [1, 2]}}, "interpolation", "interpolation.to has 2 numbers"),
        ({"interpolation": {"from": 1, "to": 2, "steps": 1}}, "interpolation", ">= 2"),
        ({"interpolation": {"from": 1, "to": 2, "steps": 4}, "n": 8}, "n", "interpolation asks for 4 images"),
    ],
)
def test_what_cannot_be_made_says_why(live: Live, fields: dict[str, Any], param: str, words: str) -> None:
    response = ask(live, **fields)
    assert words in message_of(response, 400)
    assert response.json()["error"]["param"] == param


def test_a_generator_is_refused_where_inputs_are_read(live: Live) -> None:
    for path in ("/v1/classify", "/v1/embeddings"):
        response = live.client.post(path, json={"model": "greys", "input": [1, 2, 3]})
        assert f"ask it at {PATH}" in message_of(response, 400)
    raw = {"content-type": "image/png"}
    assert PATH in message_of(live.client.post("/v1/classify?model=greys", content=b"1", headers=raw), 400)
    beside = live.client.post("/v1/embeddings", json={"model": "coder", "input": [1, 2]})
    assert beside.json()["data"][0]["embedding"] == [0.5] * 4
    response = live.client.post("/v1/classify", json={"model": "coder", "input": [1, 2]})
    assert f"ask it at /v1/embeddings or {PATH}" in message_of(response, 400)


def test_a_deadline_and_the_metrics(live: Live) -> None:
    late = live.client.post(PATH, json={"model": "greys", "n": 2}, headers={"x-request-timeout": "1e-9"})
    assert late.status_code == 408
    assert colours(ask(live, n=2))
    text = live.client.get("/metrics").text
    assert f'espalier_requests_total{{model="greys",outcome="200",route="{PATH}"}}' in text
    assert f'espalier_requests_total{{model="greys",outcome="408",route="{PATH}"}} 1.0' in text
    assert 'espalier_queue_rows{model="coder",version="1"} 0.0' in text


def test_more_images_than_the_queue_holds(tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = Settings(home=tmp_path_factory.mktemp("home"), port=0, worker=False, queue_limit=4)
    publish_generator(settings.repository, "greys")
    with running(settings) as server:
        response = ask(server, n=5)
        assert "at most 4" in message_of(response, 400)
        assert response.json()["error"]["param"] == "n"
