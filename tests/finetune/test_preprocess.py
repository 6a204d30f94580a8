"""Data sets as graph inputs: the same tensors as serving makes of the same bytes."""

from __future__ import annotations

import csv
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_iris
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from export.processing.images import decode_image
from export.processing.inputs import BadInput, ImageInput, InputSpec, TextInput, VectorInput
from export.processing.text import TextProcessor, pad
from export.processing.vectors import vector
from finetune import preprocess
from finetune.data.datasets import Dataset, open_dataset
from finetune.origin import image_input
from finetune.preprocess import Items
from finetune.recipe import Data

IMAGES = ImageInput(height=20, width=24)


def image_set(folder: Path, sizes: list[tuple[int, int]], kind: str = "PNG") -> Dataset:
    """Random images of these (width, height) in two class folders."""
    random = np.random.default_rng(0)
    path = folder / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i, (width, height) in enumerate(sizes):
            file = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, kind)
            archive.writestr(f"{'even' if i % 2 == 0 else 'odd'}/{i}.{kind.lower()}", file.getvalue())
    return open_dataset(path, path.name, Data())


def table(folder: Path, columns: list[str], rows: list[list[object]]) -> Dataset:
    path = folder / "table.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return open_dataset(path, path.name, Data())


def tokenizer() -> bytes:
    """One token a word, [CLS] before and [SEP] after."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(50))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made.to_str().encode()


def prepare(dataset: Dataset, spec: InputSpec, folder: Path, tokenizer: bytes | None = None) -> Items:
    return preprocess.prepare(dataset, spec, tokenizer, folder, lambda done, items: None)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
def test_images_are_what_serving_makes_of_the_same_bytes(kind: str, resize: str, tmp_path: Path) -> None:
    spec = ImageInput(height=20, width=24, resize=resize)  # type: ignore[arg-type]
    dataset = image_set(tmp_path, [(40, 30), (17, 90), (24, 20), (5, 5)], kind)
    items = prepare(dataset, spec, tmp_path)
    batch = items.batch(np.array([2, 0, 3, 1]))
    assert list(batch) == ["pixels"]
    assert batch["pixels"].dtype == np.uint8
    for i, item in enumerate([2, 0, 3, 1]):
        np.testing.assert_array_equal(batch["pixels"][i], decode_image(dataset.content(item), spec))


def test_texts_are_what_serving_makes_of_the_same_words(tmp_path: Path) -> None:
    spec = TextInput(max_length=12)
    texts = [" ".join(f"w{(i * j) % 60}" for j in range(1, i + 2)) for i in range(20)]
    dataset = table(tmp_path, ["text", "label"], [[text, i % 2] for i, text in enumerate(texts)])
    items = prepare(dataset, spec, tmp_path, tokenizer())
    processor = TextProcessor(spec, tokenizer())
    for chosen in ([0], [3, 1], [19, 0, 7]):
        batch = items.batch(np.array(chosen))
        ids, mask = pad(processor.encode([texts[i] for i in chosen]), spec.pad_token_id, spec.max_length)
        np.testing.assert_array_equal(batch["input_ids"], ids)
        np.testing.assert_array_equal(batch["attention_mask"], mask)
    assert items.lengths is not None
    assert items.lengths.tolist() == [min(i + 3, 12) for i in range(20)]


def test_vectors_are_what_serving_makes_of_the_same_numbers(tmp_path: Path) -> None:
    iris = load_iris()
    rows = [[*map(float, x), int(y)] for x, y in zip(iris.data, iris.target, strict=True)]
    dataset = table(tmp_path, ["a", "b", "c", "d", "label"], rows)
    spec = VectorInput(features=4)
    batch = prepare(dataset, spec, tmp_path).batch(np.arange(150))
    expected = np.stack([vector(row[:4], spec) for row in rows])  # type: ignore[arg-type]
    np.testing.assert_array_equal(batch["vector"], expected)


def test_a_selection_keeps_targets_lengths_and_inputs_together(tmp_path: Path) -> None:
    texts = [[" ".join(["w1"] * (i + 1)), "even" if i % 2 == 0 else "odd"] for i in range(10)]
    items = prepare(table(tmp_path, ["text", "label"], texts), TextInput(max_length=50), tmp_path, tokenizer())
    chosen = items.select(np.array([9, 2, 5])).select(np.array([2, 0]))  # items 5 and 9
    assert len(chosen) == 2
    assert chosen.targets.tolist() == [1, 1]
    assert chosen.lengths is not None
    assert chosen.lengths.tolist() == [8, 12]
    assert chosen.batch(np.array([0, 1]))["attention_mask"].sum(axis=1).tolist() == [8, 12]


def test_many_images_live_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = image_set(tmp_path, [(30, 30)] * 6)
    in_memory = prepare(dataset, IMAGES, tmp_path / "memory")
    monkeypatch.setattr(preprocess, "IN_MEMORY_BYTES", 6 * 20 * 24 * 3 - 1)
    in_file = prepare(dataset, IMAGES, tmp_path / "file")
    assert not (tmp_path / "memory").exists()
    assert [path.stat().st_size > 6 * 20 * 24 * 3 for path in (tmp_path / "file").iterdir()] == [True]
    rows = np.arange(6)
    np.testing.assert_array_equal(in_file.batch(rows)["pixels"], in_memory.batch(rows)["pixels"])


def test_preparing_tells_how_far_it_is_and_can_be_stopped(tmp_path: Path) -> None:
    digits = load_digits()
    rows = [[*map(float, x), f"d{y}"] for x, y in zip(digits.data[:600], digits.target[:600], strict=True)]
    dataset = table(tmp_path, [*(f"p{i}" for i in range(64)), "label"], rows)
    told: list[tuple[int, int]] = []
    preprocess.prepare(
        dataset, VectorInput(features=64), None, tmp_path, lambda done, items: told.append((done, items))
    )
    assert told == [(0, 600), (256, 600), (512, 600), (600, 600)]

    def stop(done: int, items: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preprocess.prepare(dataset, VectorInput(features=64), None, tmp_path, stop)


def test_an_item_that_does_not_fit_is_named_with_its_place(tmp_path: Path) -> None:
    dataset = table(tmp_path, ["a", "b", "label"], [[1, 2, "x"], [3, 4, "y"]])
    with pytest.raises(BadInput, match=r"^row 2: the vector has 2 numbers"):
        prepare(dataset, VectorInput(features=3), tmp_path)


def test_small_square_images_are_stretched_and_photographs_cropped(tmp_path: Path) -> None:
    assert image_input(image_set(tmp_path, [(28, 28)] * 10), 64) == ImageInput(
        height=64, width=64, resize="stretch", crop_fraction=1.0
    )
    assert image_input(image_set(tmp_path, [(28, 28)] * 6 + [(90, 20)] * 4), 64).resize == "stretch"
    for sizes in ([(300, 300)] * 10, [(60, 40)] * 10, [(28, 28)] * 4 + [(640, 480)] * 6):
        assert image_input(image_set(tmp_path, sizes), 64) == ImageInput(height=64, width=64)
