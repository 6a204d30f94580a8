"""What an assistant says, given all that was said before: instruction tuning (Ouyang et al. 2022, its first step)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import groupby

import numpy as np

from export.processing.text import TextProcessor
from export.reports import language_model
from export.reports.evaluation import Evaluation
from export.reports.language_model import Answered, LanguageModelReport
from finetune import greedy
from finetune.objectives.next_token import NextToken
from finetune.preprocess import Items
from models.network import Network

# Held-out chats that are answered freely, and the most tokens of an answer.
MOST_ANSWERED = 4
MOST_TOKENS = 64


class Chat(NextToken):
    """The tokens of the targets that are UNASKED, prompts and answers of weight 0, are read and not learned."""

    def __init__(
        self,
        train: np.ndarray,
        sizes: np.ndarray,
        processor: TextProcessor,
        ends: Collection[int],
        *,
        row: int | None = None,
    ) -> None:
        """processor: what turns tokens of the chats into texts. ends: the tokens that an answer ends with."""
        super().__init__(train, sizes, row=row)
        self.processor = processor
        self.ends = frozenset(ends)

    def examined(self, network: Network, items: Items, found: Evaluation, between: Callable[[], None]) -> Evaluation:
        """With the greedy answers to a few of the items, spread evenly, beside those of the data."""
        assert isinstance(found, LanguageModelReport)
        rows = np.unique(np.linspace(0, len(items) - 1, MOST_ANSWERED).astype(int))
        prompts = [items.batch(rows[i : i + 1])["input_ids"][0] for i in range(len(rows))]
        spans = [last_answer(items.targets[row]) for row in rows]
        asked = [prompt[: span.start].tolist() for prompt, span in zip(prompts, spans, strict=True)]
        answers = greedy.answers(network, asked, ends=self.ends, max_tokens=MOST_TOKENS, between=between)
        decode = self.processor.decode
        return language_model.with_answers(
            found,
            [
                Answered(
                    prompt=decode(prompt), reference=decode(items.targets[row][span].tolist()), answer=decode(answer)
                )
                for row, prompt, span, answer in zip(rows, asked, spans, answers, strict=True)
            ],
        )


def last_answer(targets: np.ndarray) -> slice:
    """Where the last learned tokens that stand together lie in int64 [tokens]."""
    places = np.flatnonzero(targets[1:] >= 0) + 1
    runs = [list(run) for _, run in groupby(enumerate(places.tolist()), lambda pair: pair[1] - pair[0])]
    return slice(runs[-1][0][1], runs[-1][-1][1] + 1)
