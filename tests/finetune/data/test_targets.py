"""From label columns as users write them to the numbers that are learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune import recipe
from finetune.data.datasets import Dataset, open_dataset
from finetune.data.problems import BadFile
from finetune.data.validation import inspect, kind_of, usable
from finetune.data.wanted import wanted_of
from finetune.recipe import Data, Head
from finetune.task import task_of
from models import spec
from tests.finetune.data.made import png, written, zipped


def opened(path: Path, objective: Any, data: Data | None = None, known: Dataset | None = None) -> Dataset:
    data = data or Data()
    return open_dataset(path, path.name, data, wanted_of(objective, data), known.answers if known else None)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    return written(path, "".join(json.dumps(row) + "\n" for row in rows))


def test_sets_of_labels_in_lists_and_between_bars_are_the_same(tmp_path: Path) -> None:
    sets = [["red", "round"], [], ["sour"], ["round", "sour", "round"], ["red"]]
    in_lists = jsonl(tmp_path / "a.jsonl", [{"text": f"fruit {i}", "label": one} for i, one in enumerate(sets)])
    rows = "".join(f"fruit {i},{' | '.join(one)}\n" for i, one in enumerate(sets))
    in_bars = written(tmp_path / "b.csv", "text,label\n" + rows)
    for path in (in_lists, in_bars):
        found = opened(path, recipe.MultiLabel())
        assert found.labels == ["red", "round", "sour"]
        assert found.targets.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 0, 0]]
        assert task_of(recipe.MultiLabel(), found.answers) == spec.MultiLabel(3)


def test_a_label_that_the_training_file_lacks_is_named_with_its_place(tmp_path: Path) -> None:
    training = jsonl(tmp_path / "a.jsonl", [{"text": f"t{i}", "label": ["x", "y"][: i + 1]} for i in range(2)])
    other = jsonl(tmp_path / "b.jsonl", [{"text": "t", "label": ["x"]}, {"text": "u", "label": ["x", "z"]}])
    known = opened(training, recipe.MultiLabel())
    with pytest.raises(BadFile, match=r"b\.jsonl: line 2: label 'z' does not occur in the training file"):
        opened(other, recipe.MultiLabel(), known=known)


def test_numbers_are_read_from_several_columns_which_are_no_features(tmp_path: Path) -> None:
    path = written(tmp_path / "x.csv", "a,width,b,height\n1,2.5,3,4\n5,6,7,-8e1\n9,10,11,12\n")
    data = Data(target_columns=("height", "width"))
    found = opened(path, recipe.SquaredError(), data)
    assert found.features == ["a", "b"]
    assert found.labels == ["height", "width"]
    assert found.targets.dtype == np.float32
    assert found.targets.tolist() == [[4, 2.5], [-80, 6], [12, 10]]
    assert task_of(recipe.Gaussian(), found.answers) == spec.Regression(2, "gaussian")


def test_a_number_that_is_missing_or_none_leaves_the_item_out(tmp_path: Path) -> None:
    rows = "".join(f"{i},{2 * i}\n" for i in range(40))
    path = written(tmp_path / "x.csv", "a,label\n" + rows + "50,\n51,many\n52,inf\n")
    found = opened(path, recipe.AbsoluteError())
    assert len(found) == 40
    assert [problem.place for problem in found.problems] == ["row 42", "row 43", "row 44"]
    assert "no finite number" in found.problems[0].message


def test_one_thing_may_be_measured_twice_but_not_be_of_two_classes(tmp_path: Path) -> None:
    rows = "".join(f"{i},{i % 2}\n" for i in range(40))
    path = written(tmp_path / "x.csv", "a,label\n" + rows + "7,0\n")
    assert len(opened(path, recipe.SquaredError())) == 41
    assert len(opened(path, recipe.CrossEntropy())) == 40


SEVERAL = recipe.MultiTask(
    heads={
        "kind": Head(),
        "tags": Head(objective=recipe.MultiLabel()),
        "size": Head(objective=recipe.SquaredError(), columns=("width", "height")),
    }
)


def test_cells_of_several_heads_may_be_empty_but_not_wrong(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a", "kind": "x", "tags": ["p"], "width": 1, "height": 2},
        {"text": "b", "kind": None, "tags": None, "width": 3},
        {"text": "c", "kind": "y", "tags": []},
        {"text": "d", "kind": "x", "tags": ["p", "q"], "width": "4", "height": None},
    ]
    found = opened(jsonl(tmp_path / "x.jsonl", rows), SEVERAL)
    nan = np.nan
    expected = [[0, 1, 0, 1, 2], [nan, nan, nan, 3, nan], [1, 0, 0, nan, nan], [0, 1, 1, 4, nan]]
    np.testing.assert_array_equal(found.targets, np.float32(expected))
    assert found.answers.heads == {"kind": ["x", "y"], "tags": ["p", "q"], "size": ["width", "height"]}
    assert found.labels == []
    task = task_of(SEVERAL, found.answers)
    assert task == spec.MultiTask(
        {"kind": spec.Classification(2), "tags": spec.MultiLabel(2), "size": spec.Regression(2)}
    )
    many = [*rows, *({**rows[0], "text": f"e{i}"} for i in range(30))]
    wrong = [*many, {"text": "f", "kind": "x", "width": "wide"}, {"text": "g"}]
    problems = opened(jsonl(tmp_path / "y.jsonl", wrong), SEVERAL).problems
    assert [problem.place for problem in problems] == ["line 35", "line 36"]


def test_a_validation_file_keeps_the_heads_of_the_training_file(tmp_path: Path) -> None:
    objective = recipe.MultiTask(heads={"kind": Head(), "size": Head(objective=recipe.SquaredError())})
    training = jsonl(tmp_path / "a.jsonl", [{"text": f"{k}", "kind": k, "size": 1} for k in ("x", "y", "z")])
    other = jsonl(tmp_path / "b.jsonl", [{"text": "u", "kind": "z", "size": 2}, {"text": "v", "kind": "y"}])
    known = opened(training, objective)
    assert opened(other, objective, known=known).targets[:, 0].tolist() == [2, 1]
    stranger = jsonl(tmp_path / "c.jsonl", [{"text": "u", "kind": "w", "size": 2}])
    with pytest.raises(BadFile, match="label 'w' does not occur"):
        opened(stranger, objective, known=known)


def test_two_classes_are_what_one_sigmoid_tells_apart(tmp_path: Path) -> None:
    path = written(tmp_path / "x.csv", "a,label\n" + "".join(f"{i},{i % 3}\n" for i in range(9)))
    found = opened(path, recipe.BinaryCrossEntropy())
    with pytest.raises(ValueError, match="the data have 3: 0, 1, 2; take cross_entropy"):
        task_of(recipe.BinaryCrossEntropy(), found.answers)


def test_images_have_numbers_in_a_table_beside_them(tmp_path: Path) -> None:
    members = {f"pictures/{i}.png": png(i) for i in range(5)}
    table = "image,age\n" + "".join(f"pictures/{i}.png,{20 + i}\n" for i in range(5))
    path = zipped(tmp_path / "x.zip", {"ages.csv": table.encode(), **members})
    found = opened(path, recipe.SquaredError(), Data(label_column="age"))
    assert (found.kind, found.targets.ravel().tolist()) == ("images", [20, 21, 22, 23, 24])
    folders = zipped(tmp_path / "y.zip", {f"{i % 2}/{i}.png": png(i) for i in range(4)})
    with pytest.raises(BadFile, match="put a table at the archive's top"):
        opened(folders, recipe.SquaredError())


@pytest.mark.parametrize(
    ("objective", "data", "words"),
    [
        (recipe.SquaredError(), Data(label_column="price"), "no column 'price'"),
        (recipe.SquaredError(), Data(target_columns=("x", "weight")), "no column 'weight'"),
        (recipe.SquaredError(), Data(label_column="kind"), "'kind' holds no numbers"),
        (recipe.MultiTask(heads={"age": Head()}), Data(), "no column 'age'"),
        (recipe.MultiTask(heads={"only": Head()}), Data(), "only one class"),
    ],
)
def test_what_cannot_be_learned_is_known_from_the_report(
    tmp_path: Path, objective: Any, data: Data, words: str
) -> None:
    rows = "".join(f"{i},{i / 7},{'abc'[i % 3]},7\n" for i in range(30))
    report = inspect(written(tmp_path / "x.csv", "x,y,kind,only\n" + rows), "x.csv")
    assert words in "; ".join(usable(report, data, wanted_of(objective, data)))


def test_an_upload_with_lists_for_labels_is_described_by_its_labels(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": ["a", "b"][: i % 3]} for i in range(9)]
    path = jsonl(tmp_path / "x.jsonl", rows)
    report = inspect(path, path.name)
    assert (report.kind, report.items, report.classes) == ("text", 9, {"a": 6, "b": 3})
    assert usable(report, Data(), wanted_of(recipe.MultiLabel(), Data())) == []
    assert "is no label of classes" in usable(report, Data())[0]


def test_the_kind_of_a_table_is_known_from_what_is_learned_of_it(tmp_path: Path) -> None:
    rows = "".join(f"{i},{i / 7},{'abc'[i % 3]},{'de'[i % 2]}\n" for i in range(30))
    report = inspect(written(tmp_path / "x.csv", "x,y,kind,side\n" + rows), "x.csv")
    both = recipe.MultiTask(heads={"kind": Head(), "side": Head()})
    assert kind_of(report, Data(), wanted_of(both, Data())) == "table"
    assert kind_of(report, Data(), wanted_of(recipe.SquaredError(), Data(label_column="y"))) == report.kind == "text"
