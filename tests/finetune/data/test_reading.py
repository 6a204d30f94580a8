"""Data files: how they are read, what is wrong with their items, and how they are split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from finetune.data.datasets import open_dataset
from finetune.data.problems import BadFile
from finetune.data.splits import leakage, split
from finetune.data.validation import inspect, usable
from finetune.data.wanted import NOTHING
from finetune.recipe import Data
from tests.finetune.data.made import FOLDERS, png, tarred, written, zipped


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tars_are_read_however_they_are_packed(tmp_path: Path, mode: str) -> None:
    path = tarred(tmp_path / "x.tar", FOLDERS, mode)
    report = inspect(path, "x.tar")
    assert report.classes == {"cat": 5, "dog": 5}
    dataset = open_dataset(path, "x.tar", Data())
    assert dataset.content(0) == FOLDERS[dataset.place(0)]


@pytest.mark.parametrize("prefix", ["", "pets/"])
def test_a_folder_around_the_class_folders_is_looked_through(tmp_path: Path, prefix: str) -> None:
    members = {prefix + name: content for name, content in FOLDERS.items()} | {
        "__MACOSX/x": b"",
        prefix + ".DS_Store": b"",
    }
    report = inspect(zipped(tmp_path / "x.zip", members), "x.zip")
    assert (report.kind, report.classes, report.problem_count) == ("images", {"cat": 5, "dog": 5}, 0)


def test_images_may_be_named_by_a_table(tmp_path: Path) -> None:
    rows = "".join(f"pictures/{name.replace('/', '-')},{name[:3]}\n" for name in FOLDERS)
    members = {f"pictures/{name.replace('/', '-')}": content for name, content in FOLDERS.items()}
    path = zipped(
        tmp_path / "x.zip", {"labels.csv": b"image,label\n" + rows.encode() + b"pictures/none.png,cat\n", **members}
    )
    report = inspect(path, "x.zip")
    assert report.classes == {"cat": 5, "dog": 5}
    assert report.problems[0].place == "labels.csv row 12"
    assert "not in the archive" in report.problems[0].message


def test_broken_duplicate_and_contradicting_images_are_named(tmp_path: Path) -> None:
    members = {
        **FOLDERS,
        "cat/cut.png": png(1)[:100],
        "cat/again.png": png(1),
        "dog/other.png": png(2),
        "stray.png": png(3),
    }
    report = inspect(zipped(tmp_path / "x.zip", members), "x.zip")
    places = {problem.place: problem.message for problem in report.problems}
    assert places.keys() == {"cat/cut.png", "dog/other.png", "stray.png"}
    assert "labelled 'dog'" in places["dog/other.png"]
    assert [(d.place, d.first) for d in report.duplicates] == [("cat/again.png", "cat/1.png")]


ROWS = [("the cat", "en"), ("il gatto", "it"), ("the dog", "en"), ('il "cane", rosso\nqui', "it")]


def test_csv_jsonl_and_parquet_hold_the_same(tmp_path: Path) -> None:
    quoted = "".join(f'"{text.replace(chr(34), chr(34) * 2)}",{label}\n' for text, label in ROWS)
    paths = [
        written(tmp_path / "x.csv", "\ufefftext,label\n" + quoted),
        written(tmp_path / "x.jsonl", "".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in ROWS)),
        tmp_path / "x.parquet",
    ]
    parquet.write_table(pyarrow.table({"text": [t for t, _ in ROWS], "label": [c for _, c in ROWS]}), paths[2])
    for path in paths:
        assert inspect(path, path.name).classes == {"en": 2, "it": 2}
        dataset = open_dataset(path, path.name, Data())
        assert [(dataset.content(i), dataset.labels[dataset.targets[i]]) for i in range(4)] == ROWS


def test_labels_stay_as_they_are_written(tmp_path: Path) -> None:
    path = written(tmp_path / "x.csv", "text,label\na,007\nb,7\nc,007\nd,7\n")
    assert inspect(path, "x.csv").classes == {"007": 2, "7": 2}


def test_numbers_make_vectors(tmp_path: Path) -> None:
    path = written(tmp_path / "x.csv", "a,b,label\n1,2.5,x\n-3e2,4,y\n5,6,x\n7,8,y\n")
    report = inspect(path, "x.csv")
    assert (report.kind, report.features) == ("table", ["a", "b"])
    assert open_dataset(path, "x.csv", Data()).content(1) == [-300.0, 4.0]


def test_a_number_that_is_none_is_named(tmp_path: Path) -> None:
    rows = "".join(f"{i},{'x' if i % 2 else 'y'}\n" for i in range(20))
    report = inspect(written(tmp_path / "x.csv", f"a,label\n{rows}nan,x\n"), "x.csv")
    assert [(p.place, "finite" in p.message) for p in report.problems] == [("row 22", True)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", '{"text": "a", "label": "b"}\n{"text": \n', "line 2"),
        ("x.jsonl", '{"text": "a", "label": "b"}\n[1]\n', "line 2"),
        ("x.csv", "text,label\na,b\na,b,c\n", "row 3 has 3 values, the first row names 2"),
        ("x.csv", b"text,label\ncaf\xe9,b\n", "byte 14"),
        ("x.csv", "text,text\na,b\n", "two columns"),
        ("x.csv", "text,label\n", "no rows"),
        ("x.csv", "\n", "empty"),
        ("x.parquet", b"PAR1 nothing", "Parquet"),
        ("x.docx", b"hello", "not a format"),
    ],
)
def test_tables_that_cannot_be_read_name_the_place(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    with pytest.raises(BadFile, match=words):
        inspect(written(tmp_path / name, content), name)


def test_a_report_says_why_a_job_cannot_use_the_file(tmp_path: Path) -> None:
    one = inspect(written(tmp_path / "a.csv", "text,label\na,x\nb,x\n"), "a.csv")
    assert "only one class, 'x'" in usable(one, Data())[0]
    other = inspect(written(tmp_path / "b.csv", "sentence,lang\nqui,it\nla,it\nici,fr\n"), "b.csv")
    assert "'sentence', 'lang'" in usable(other, Data())[0]
    assert "single item" in usable(other, Data(text_column="sentence", label_column="lang"))[0]
    fine = inspect(written(tmp_path / "c.csv", "sentence,lang\nqui,it\nla,it\nici,fr\ntu,fr\n"), "c.csv")
    assert usable(fine, Data(text_column="sentence", label_column="lang")) == []


def test_a_few_broken_items_are_left_out_and_many_are_an_error(tmp_path: Path) -> None:
    rows = "".join(f"text {i},{i % 2}\n" for i in range(20))
    dataset = open_dataset(written(tmp_path / "x.csv", f"text,label\n{rows} ,1\n"), "x.csv", Data())
    assert len(dataset) == 20
    assert dataset.problems[0].place == "row 22"
    with pytest.raises(BadFile, match="more than a tenth"):
        open_dataset(
            written(tmp_path / "y.csv", f"text,label\n{rows}{' ,1' + chr(10)}" * 1 + " ,1\n" * 5), "y.csv", Data()
        )


def sentences(tmp_path: Path, order: list[int], name: str = "x.csv") -> Path:
    rows = "".join(f"text {i},{'abc'[i % 3]}\n" for i in order)
    return written(tmp_path / name, "text,label\n" + rows)


def test_a_split_is_stratified_whole_and_keeps_duplicates_together(tmp_path: Path) -> None:
    path = sentences(tmp_path, [*range(90), *range(0, 90, 2)])
    dataset = open_dataset(path, "x.csv", Data())
    parts = split(dataset, Data(validation=0.2, test=0.1), seed=3)
    everything = np.concatenate([parts.train, parts.validation, parts.test])
    assert sorted(everything) == list(range(len(dataset)))
    for part, share in ((parts.validation, 0.2), (parts.test, 0.1)):
        for label in range(3):
            contents = {dataset.content(i) for i in part if dataset.targets[i] == label}
            assert len(contents) == round(30 * share)
    sides = [{dataset.content(i) for i in part} for part in (parts.train, parts.validation, parts.test)]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]


def test_a_split_follows_from_content_and_seed_alone(tmp_path: Path) -> None:
    forward = open_dataset(sentences(tmp_path, list(range(60))), "x.csv", Data())
    backward = open_dataset(sentences(tmp_path, list(range(60))[::-1], "y.csv"), "y.csv", Data())

    def held(dataset: object, seed: int) -> set[str]:
        return {dataset.content(i) for i in split(dataset, Data(), seed).validation}  # type: ignore[attr-defined, arg-type]

    assert held(forward, 1) == held(backward, 1)
    assert held(forward, 1) != held(forward, 2)


def test_even_a_class_of_two_is_on_both_sides(tmp_path: Path) -> None:
    rows = "".join(f"common {i},a\n" for i in range(50)) + "rare 1,b\nrare 2,b\n"
    dataset = open_dataset(written(tmp_path / "x.csv", "text,label\n" + rows), "x.csv", Data())
    parts = split(dataset, Data(), seed=0)
    assert set(dataset.targets[parts.train]) == set(dataset.targets[parts.validation]) == {0, 1}


def test_leakage_and_strange_labels_between_files_are_found(tmp_path: Path) -> None:
    training = open_dataset(sentences(tmp_path, list(range(30))), "x.csv", Data())
    other = sentences(tmp_path, [29, 30, 31], "y.csv")
    validation = open_dataset(other, "y.csv", Data(), known=training.answers)
    assert leakage(training, validation) == [("row 31", "row 2")]
    with pytest.raises(BadFile, match="label 'c' does not occur"):
        open_dataset(other, "y.csv", Data(), known=replace(training.answers, labels=["a", "b"]))


def test_images_in_no_class_folder_are_items_without_labels(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "x.zip", {"1.png": png(1), "2.png": png(2), "3.png": b"none"})
    report = inspect(archive, "x.zip")
    assert (report.kind, report.items, report.classes, report.problem_count) == ("images", 2, {}, 1)
    assert "no class folders" in usable(report, Data())[0]
    assert usable(report, Data(), NOTHING) == []
    with pytest.raises(BadFile, match="no class folders"):
        open_dataset(archive, "x.zip", Data())
    more = zipped(tmp_path / "y.zip", {f"{i}.png": png(i) for i in range(20)})
    unlabelled = open_dataset(more, "y.zip", Data(), NOTHING)
    assert (len(unlabelled), unlabelled.labels) == (20, [])
    sides = split(unlabelled, Data(validation=0.2), seed=1)
    assert (len(sides.train), len(sides.validation)) == (16, 4)
