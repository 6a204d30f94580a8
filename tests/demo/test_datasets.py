"""The demo's data: as many as promised, and nothing held out that training has seen."""

from __future__ import annotations

import csv
import io
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.datasets import LANGUAGES, SHORTEST, catalogue, cleaned, digits, languages, words
from finetune.data.validation import inspect, usable
from finetune.recipe import Data


def test_digits_are_divided_evenly_and_none_is_on_both_sides(tmp_path: Path) -> None:
    path, held_out = digits(tmp_path)
    report = inspect(path, path.name)
    assert report.classes == {str(digit): 400 for digit in range(10)}
    assert (report.problem_count, report.duplicate_count, usable(report, Data())) == (0, 0, [])
    assert Counter(label for _, label in held_out) == {str(digit): 100 for digit in range(10)}
    with zipfile.ZipFile(path) as archive:
        trained = {archive.read(name) for name in archive.namelist()}
    assert not trained & {png for png, _ in held_out}
    image = Image.open(io.BytesIO(held_out[0][0]))
    assert (image.size, image.mode) == ((28, 28), "L")
    assert np.asarray(image).max() > 200


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str]], list[tuple[str, str]]]:
    path, held_out = languages(tmp_path_factory.mktemp("languages"))
    with path.open(newline="", encoding="utf-8") as file:
        return path, [(row["text"], row["label"]) for row in csv.DictReader(file)], held_out


Sentences = tuple[Path, list[tuple[str, str]], list[tuple[str, str]]]


def test_every_language_has_enough_clean_sentences(sentences: Sentences) -> None:
    path, training, held_out = sentences
    report = inspect(path, path.name)
    assert (report.items, report.problem_count, report.duplicate_count) == (len(training), 0, 0)
    assert report.classes.keys() == set(LANGUAGES)
    assert min(report.classes.values()) >= 200
    assert min(Counter(language for _, language in held_out).values()) >= 40
    assert {language for _, language in held_out} == set(LANGUAGES)
    for text, _ in training + held_out:
        assert len(text) >= SHORTEST
        assert not set(text) & set("%{}<>&\x04\n")


def test_no_source_sentence_is_on_both_sides(sentences: Sentences) -> None:
    _, training, held_out = sentences
    sources: dict[str, set[str]] = {}
    for language in LANGUAGES:
        for english, text in catalogue(language):
            sources.setdefault(words(text), set()).add(words(english))
    trained = {words(text) for text, _ in training}
    tested = {words(text) for text, _ in held_out}
    assert len(trained | tested) == len(training) + len(held_out)
    assert not {s for key in trained for s in sources[key]} & {s for key in tested for s in sources[key]}


def test_only_the_words_of_a_message_are_kept() -> None:
    assert cleaned('<a href="x">%(name)s</a> is\n%(size).1f KB,  100%% &amp; {more!r}') == "is KB, 100"
    assert cleaned("Select %s to view & change") == "Select to view change"
