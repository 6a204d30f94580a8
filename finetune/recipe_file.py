"""A recipe in a YAML file. Its errors name the file, the line and the field."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import yaml

from finetune.recipe import Recipe

PLACE = re.compile(r"(?P<what>.*) - at `\$(?P<path>.*)`$", re.DOTALL)
STEP = re.compile(r"\.(?P<field>[^.\[]+)|\[(?P<index>\d+|\.\.\.)\]")
UNKNOWN_FIELD = re.compile(r"unknown field `(?P<field>.+)`")


class Loader(yaml.SafeLoader):
    """YAML 1.1 takes 2e-3 for a string; learning rates are written like that."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class RecipeError(ValueError):
    """A recipe file that cannot be used: "recipe.yaml:12: optimizer.momentum: Expected `float` <= 1.0"."""


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. Raises RecipeError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text: {error}") from error
    try:
        root = yaml.compose(text, Loader=Loader)
        content = yaml.load(text, Loader=Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{path}: {error}") from error
    try:
        return msgspec.convert(content, Recipe)
    except msgspec.ValidationError as error:
        raise RecipeError(located(path, root, str(error))) from error


def located(path: Path, root: yaml.Node | None, message: str) -> str:
    """msgspec's message with the line of what it complains about."""
    match = PLACE.fullmatch(message)
    what, steps = (match["what"], match["path"]) if match else (message, "")
    stranger = UNKNOWN_FIELD.search(what)
    if stranger:
        steps += f".{stranger['field']}"
    line = line_of(root, steps) if root is not None else 1
    return f"{path}:{line}: {steps.lstrip('.') or 'recipe'}: {what}"


def line_of(node: yaml.Node, steps: str) -> int:
    """Line (from 1) of the deepest node on the way that the file has."""
    line = node.start_mark.line
    for step in STEP.finditer(steps):
        if isinstance(node, yaml.MappingNode):
            found = [pair for pair in node.value if pair[0].value == step["field"]]
            if not found:
                break
            line, node = found[0][0].start_mark.line, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and (step["index"] or "").isdecimal():
            node = node.value[int(step["index"])]
            line = node.start_mark.line
        else:
            break
    return line + 1
