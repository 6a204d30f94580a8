"""Which cells of a data file an objective learns from, and what they mean."""

from __future__ import annotations

from typing import Literal

import msgspec

from finetune import recipe
from finetune.recipe import Data, Objective

Meaning = Literal["class", "set", "number", "text", "chat", "nothing"]
SEPARATOR = "|"


class Column(msgspec.Struct, frozen=True):
    """One column of labels. `required`: an item without a value in it cannot be used. head: the output it teaches."""

    name: str
    meaning: Meaning
    required: bool = True
    head: str = ""


class Wanted(msgspec.Struct, frozen=True):
    """The label columns of an objective, in the order of its targets; none for one that learns without labels.

    kind: "class", "set", "number", "text" for those of one meaning, "several" for several heads, "chat" for
    conversations, which hold what is learned themselves, "nothing".
    """

    kind: Literal["class", "set", "number", "text", "several", "chat", "nothing"]
    columns: tuple[Column, ...] = ()


NOTHING = Wanted("nothing")
CHATS = Wanted("chat")
MEANINGS: dict[type, Meaning] = {
    recipe.CrossEntropy: "class",
    recipe.KlDivergence: "class",
    recipe.BinaryCrossEntropy: "class",
    recipe.MultiLabel: "set",
    recipe.SquaredError: "number",
    recipe.AbsoluteError: "number",
    recipe.Gaussian: "number",
    recipe.Translation: "text",
    recipe.Chat: "chat",
}


def wanted_of(objective: Objective, data: Data) -> Wanted:
    """What `objective` learns from a file whose columns are as `data` says."""
    if isinstance(objective, recipe.MultiTask):
        columns = [
            Column(column, MEANINGS[type(head.objective)], required=False, head=name)
            for name, head in objective.heads.items()
            for column in (head.columns or (name,))
        ]
        return Wanted("several", tuple(columns))
    match MEANINGS.get(type(objective), "nothing"):
        case "number":
            return Wanted(
                "number", tuple(Column(name, "number") for name in data.target_columns or (data.label_column,))
            )
        case "set":
            return Wanted("set", (Column(data.label_column, "set"),))
        case "text":
            return Wanted("text", (Column(data.translation_column, "text"),))
        case "class":
            return Wanted("class", (Column(data.label_column, "class"),))
        case "chat":
            return CHATS
    return NOTHING
