"""Series in data files: lists of numbers, or lists of steps, in JSONL and Parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from finetune.data.datasets import open_dataset
from finetune.data.problems import BadFile
from finetune.data.validation import inspect, usable
from finetune.recipe import Data
from tests.finetune.data.made import written

GOOD = [{"series": [[i, -i], [i + 1, 0.5]], "label": "up" if i % 2 else "down"} for i in range(40)]


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    return written(path, "".join(json.dumps(row) + "\n" for row in rows))


def test_jsonl_and_parquet_hold_the_same_series(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(GOOD), tmp_path / "x.parquet")
    one = open_dataset(lines(tmp_path / "x.jsonl", GOOD), "x.jsonl", Data())
    other = open_dataset(tmp_path / "x.parquet", "x.parquet", Data())
    assert (one.kind, other.kind) == ("series", "series")
    np.testing.assert_array_equal(one.content(3), [[3, -3], [4, 0.5]])
    for item in range(len(GOOD)):
        np.testing.assert_array_equal(one.content(item), other.content(item))
        assert one.digest(item) == other.digest(item)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "holds NoneType, not a list of numbers"),
        ([], "empty"),
        ([[1, 2], [3]], "step 1 has 1 numbers, others have 2"),
        ([[1, 2], [3, None]], "step 1 holds None, not a number"),
        ([[1, "2"]], "step 0 holds '2', not a number"),
        ([1.0, 2.0], "steps have 1 numbers; those of the other series have 2"),
        ([[1, 1e300]], "step 0 holds 1e+300, not a finite number"),
        ([[[1, 2], [3, 4]]], "not a number"),
    ],
)
def test_a_broken_series_is_named(tmp_path: Path, value: object, words: str) -> None:
    path = lines(tmp_path / "x.jsonl", [*GOOD, {"series": value, "label": "up"}])
    report = inspect(path, "x.jsonl")
    assert (report.kind, report.items, report.classes) == ("series", 40, {"down": 20, "up": 20})
    assert report.problems[0].place == "line 41"
    assert words in report.problems[0].message


def test_duplicates_and_contradictions_are_found(tmp_path: Path) -> None:
    again, other = {**GOOD[1]}, {**GOOD[2], "label": "up"}
    report = inspect(lines(tmp_path / "x.jsonl", [*GOOD, again, other]), "x.jsonl")
    assert report.duplicates[0].place == "line 41"
    assert "the same content is line 3" in report.problems[0].message


def test_the_column_may_have_another_name(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", [{"ecg": row["series"], "kind": row["label"]} for row in GOOD])
    report = inspect(path, "x.jsonl")
    data = Data(series_column="ecg", label_column="kind")
    assert (report.kind, usable(report, data)) == ("series", [])
    assert usable(report, Data(label_column="kind"))[0].startswith("there is no column 'series'")
    assert len(open_dataset(path, "x.jsonl", data)) == 40


def test_a_column_of_numbers_called_series_is_a_feature(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", [{"series": i, "label": "ab"[i % 2]} for i in range(10)])
    assert inspect(path, "x.jsonl").kind == "table"


def test_lists_of_numbers_under_a_strange_name_are_pointed_out(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", [{"ecg": row["series"], "label": row["label"]} for row in GOOD])
    with pytest.raises(BadFile, match=r"data\.series_column"):
        open_dataset(path, "x.jsonl", Data())
