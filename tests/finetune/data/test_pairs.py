"""Texts with their translations: read, checked, and refused where they are not what is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import Table, parquet

from finetune.data.checked import MOST_CHARACTERS
from finetune.data.datasets import Dataset, open_dataset
from finetune.data.problems import BadFile
from finetune.data.splits import split
from finetune.data.validation import inspect, usable
from finetune.data.wanted import wanted_of
from finetune.recipe import CrossEntropy, Data, Translation

PAIRS = [(f"page {i}", f"pagina {i}") for i in range(40)]
WANTED = wanted_of(Translation(), Data())


def lines(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(pairs: list[tuple[Any, Any]]) -> list[dict[str, Any]]:
    return [{"text": text, "translation": translation} for text, translation in pairs]


def opened(path: Path, data: Data | None = None) -> Dataset:
    data = data or Data()
    return open_dataset(path, path.name, data, wanted_of(Translation(), data))


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_pairs_are_read_from_every_kind_of_table(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"pairs.{form}"
    if form == "csv":
        path.write_text("text,translation\n" + "".join(f"{one},{other}\n" for one, other in PAIRS))
    elif form == "jsonl":
        path = lines(tmp_path, rows(PAIRS))
    else:
        parquet.write_table(Table.from_pylist(rows(PAIRS)), path)
    report = inspect(path, path.name)
    assert (report.kind, report.items, report.classes, report.problem_count) == ("pairs", 40, {}, 0)
    assert usable(report, Data(), WANTED) == []
    dataset = opened(path)
    assert [(dataset.content(i), dataset.targets[i]) for i in range(40)] == PAIRS


def test_what_is_wrong_with_a_pair_is_told_with_its_place(tmp_path: Path) -> None:
    wrong = [
        ("no translation", None),
        ("blank", "  "),
        ("a number", 7),
        ("long", "x" * (MOST_CHARACTERS + 1)),
        (None, "x"),
    ]
    path = lines(tmp_path, rows([*PAIRS, *wrong]))
    report = inspect(path, path.name)
    assert report.items == 40
    assert [problem.place for problem in report.problems] == [f"line {i}" for i in range(41, 46)]
    told = [problem.message for problem in report.problems]
    assert told[:3] == ["the translation is empty, or no text"] * 3
    assert "the translation has 1,000,001 characters" in told[3]
    assert told[4] == "the text is empty"
    with pytest.raises(BadFile, match=r"5 of 45 items cannot be used.*line 41: the translation is empty"):
        opened(path)


def test_a_pair_that_is_there_twice_is_a_duplicate_and_another_translation_is_not(tmp_path: Path) -> None:
    path = lines(tmp_path, rows([*PAIRS, ("page 1", "foglio 1"), ("page 1", "foglio 1"), ("page 2", "pagina 2")]))
    report = inspect(path, path.name)
    assert (report.items, report.problem_count) == (43, 0)
    assert [(one.place, one.first) for one in report.duplicates] == [("line 42", "line 41"), ("line 43", "line 3")]
    for seed in range(10):
        parts = split(opened(path), Data(validation=0.3), seed)
        held = {1, 40, 41} & set(parts.validation.tolist())
        assert held in (set(), {1, 40, 41}), "all translations of a text fall on one side"


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    path = lines(tmp_path, [{"en": one, "it": other} for one, other in PAIRS])
    report = inspect(path, path.name)
    data = Data(text_column="en", translation_column="it")
    assert usable(report, data, wanted_of(Translation(), data)) == []
    assert opened(path, data).targets.tolist() == [other for _, other in PAIRS]
    missing = usable(report, Data(text_column="en"), WANTED)
    assert missing == ["there is no column 'translation'; the columns are 'en', 'it'"]


def test_labels_stay_labels_where_translations_stand_beside_them(tmp_path: Path) -> None:
    path = lines(tmp_path, [{**row, "label": "ab"[i % 2]} for i, row in enumerate(rows(PAIRS))])
    report = inspect(path, path.name)
    assert (report.kind, report.classes) == ("text", {"a": 20, "b": 20})
    assert usable(report, Data(), WANTED) == []
    only = lines(tmp_path, rows(PAIRS))
    reasons = usable(inspect(only, "pairs.jsonl"), Data(), wanted_of(CrossEntropy(), Data()))
    assert reasons == ["there is no column 'label'; the columns are 'text', 'translation'"]


def test_targets_are_texts_of_usable_items_only(tmp_path: Path) -> None:
    path = lines(tmp_path, rows([*PAIRS[:20], ("no translation", ""), *PAIRS[20:]]))
    dataset = opened(path)
    assert dataset.targets.dtype == object
    assert dataset.targets.tolist() == [translation for _, translation in PAIRS]
    assert np.array_equal(dataset.answers.strata, np.zeros(40))
    assert [problem.place for problem in dataset.problems] == ["line 21"]
