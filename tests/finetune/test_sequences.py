"""How series and texts of a data set enter a network that learns them from nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.processing.inputs import SeriesInput, TextInput
from finetune.data.datasets import Dataset, open_dataset
from finetune.origin import Origin, Reading, read
from finetune.preprocess import prepare
from finetune.recipe import Data, Recipe
from models.spec import Classification, ModelSpec

SERIES = [{"series": [[i, j] for j in range(1 + i % 4)], "label": "ab"[i % 2]} for i in range(20)]
TEXTS = [{"text": f"{'bad' if i % 2 else 'good'} news {i}", "label": "ab"[i % 2]} for i in range(20)]


def dataset(folder: Path, rows: list[dict[str, Any]]) -> Dataset:
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_dataset(path, "x.jsonl", Data())


def reading(data: Dataset, rows: np.ndarray | None = None, max_length: int | None = None, **hyper: Any) -> Reading:
    origin = Origin(name="gru", spec=ModelSpec(architecture="gru", hyperparameters=hyper))
    recipe = Recipe(model="gru", training_file="file-1", max_length=max_length)
    rows = np.arange(len(data)) if rows is None else rows
    return read(origin, recipe, data, rows, Classification(2), {})


def test_a_series_network_is_completed_from_the_data(tmp_path: Path) -> None:
    data = dataset(tmp_path, SERIES)
    found = reading(data)
    assert found.input == SeriesInput(channels=2, max_length=8)
    assert found.spec.hyperparameters == {"channels": 2, "max_length": 8}
    items = prepare(data, found.input, None, tmp_path, lambda done, total: None)
    assert items.lengths is not None
    assert items.lengths[:4].tolist() == [1, 2, 3, 4]
    batch = items.batch(np.array([1, 2]))
    assert list(batch) == ["series", "attention_mask"], "in the order of the network's arguments"
    assert batch["series"].tolist() == [[[1, 0], [1, 1], [0, 0]], [[2, 0], [2, 1], [2, 2]]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_a_vocabulary_is_learned_from_the_training_split_only(tmp_path: Path) -> None:
    data = dataset(tmp_path, TEXTS)
    good = np.arange(0, 20, 2)
    one, other = reading(data, good), reading(data, np.arange(20))
    assert one.tokenizer is not None
    assert one.input == TextInput(max_length=256, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    assert '"Ġnews"' in one.tokenizer.decode()
    assert '"good"' in one.tokenizer.decode()
    assert '"bad"' not in one.tokenizer.decode()
    assert one.spec.hyperparameters["vocabulary"] < other.spec.hyperparameters["vocabulary"]


@pytest.mark.parametrize(
    ("rows", "hyper", "max_length", "words"),
    [
        (SERIES, {"channels": 3}, None, "the steps of the data have 2 numbers, gru takes 3"),
        (SERIES, {"vocabulary": 300}, None, "the data are series, gru reads texts"),
        (TEXTS, {"channels": 2}, None, "the data are texts, gru reads series"),
        ([*SERIES, {"series": [[1, 2]] * 9, "label": "a"}], {}, 8, "max_length: 8 steps, but the series of line 21"),
    ],
)
def test_data_of_another_kind_are_refused_in_words(
    tmp_path: Path, rows: list[dict[str, Any]], hyper: dict[str, Any], max_length: int | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        reading(dataset(tmp_path, rows), max_length=max_length, **hyper)
