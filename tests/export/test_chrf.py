"""chrF against sacrebleu's, and against what can be counted by hand."""

from __future__ import annotations

import pytest

from export.reports.chrf import chrf

TRANSLATIONS = ["la pagina non esiste", "questo campo è obbligatorio", "ok", "il gatto", "x"]
REFERENCES = [
    "la pagina richiesta non esiste",
    "questo campo è obbligatorio.",
    "no",
    "i gatti dormono sul tetto",
    "una parola lunga",
]
# sacrebleu 2.6.0: CHRF().corpus_score(...).score, of each pair and of all.
BY_SACREBLEU = [58.35518917281931, 96.39149075818747, 25.0, 14.483547551661768, 0.0]
OF_ALL = 52.750736014777885
THE_OTHER_WAY = 79.11429288607891


@pytest.mark.parametrize("i", range(5))
def test_a_pair(i: int) -> None:
    assert 100 * chrf(TRANSLATIONS[i : i + 1], REFERENCES[i : i + 1]) == pytest.approx(BY_SACREBLEU[i], rel=1e-12)


def test_a_set_is_counted_as_one_text() -> None:
    assert 100 * chrf(TRANSLATIONS, REFERENCES) == pytest.approx(OF_ALL, rel=1e-12)
    assert 100 * chrf(REFERENCES, TRANSLATIONS) == pytest.approx(THE_OTHER_WAY, rel=1e-12)


def test_bounds() -> None:
    assert chrf(REFERENCES, REFERENCES) == 1.0
    assert chrf(["abc"], ["xyz"]) == chrf([""], ["xyz"]) == chrf([""], [""]) == 0.0
    assert chrf(["a b c"], ["abc"]) == 1.0, "white space does not count"


def test_by_hand() -> None:
    # Of "abd": 2 of 3 letters and 1 of 2 pairs are in "abc"; no triple is.
    mean = (2 / 3 + 1 / 2 + 0) / 3
    assert chrf(["abd"], ["abc"]) == pytest.approx(mean)
    # Precision 1; recall 2 of 4 letters and 1 of 3 pairs, and recall counts four times.
    recall = (2 / 4 + 1 / 3) / 2
    assert chrf(["ab"], ["abcd"]) == pytest.approx(5 * recall / (4 + recall))
