"""`espalier serve | finetune RECIPE.yaml | export MODEL | models | keys create, list or revoke | config`.

`finetune` and `export` need torch, which the server must not import: they are named here and imported when asked for.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from export.storage import mirror
from server.settings import FIELDS, FILE_VARIABLE, Loaded, SettingsError, flag_of, load

# Command → "module:function" with the signature (arguments, repository, backbones, home) -> exit status.
TRAINING_COMMANDS = {"finetune": "finetune.command:finetune", "export": "finetune.command:export"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status (2: the command line or a setting is wrong)."""
    parsed = parser().parse_args(arguments)
    try:
        loaded = load(given_flags(parsed), os.environ, config_file(parsed.config))
    except SettingsError as error:
        print(f"espalier: {error}", file=sys.stderr)
        return 2
    for name in loaded.unknown:
        print(f"espalier: {name} is no setting and has no effect; see `espalier config`", file=sys.stderr)
    if parsed.command in TRAINING_COMMANDS:
        return run_training_command(parsed, loaded)
    if parsed.command == "keys":
        from server import key_commands

        return key_commands.run(parsed, loaded.settings)
    try:
        return {"serve": serve, "models": models, "config": config}[parsed.command](loaded)
    except SettingsError as error:  # one that needs a package which is not installed
        print(f"espalier: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    settings = argparse.ArgumentParser(add_help=False)
    group = settings.add_argument_group("settings", "each is also an ESPALIER_* variable and a key of the TOML file")
    group.add_argument("--config", type=Path, metavar="FILE", help=f"TOML file (or {FILE_VARIABLE}; ./espalier.toml)")
    for field, annotation in FIELDS.items():
        kind, meta = typing.get_args(annotation)
        options: dict[str, Any] = {"dest": field, "default": argparse.SUPPRESS, "help": meta.description}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = "VALUE"
        group.add_argument(flag_of(field), **options)
    whole = argparse.ArgumentParser(prog="espalier", description="Fine-tune networks over HTTP and serve them.")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, words: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, parents=[settings], help=words, description=words)

    command("serve", "run the HTTP server")
    finetune = command("finetune", "run one recipe here; the same command goes on after an interruption")
    finetune.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="its files are paths relative to it")
    export = command("export", "publish a backbone as it is, without training")
    export.add_argument("model", metavar="MODEL", help="a backbone's name, a folder, a GGUF file or a hub id")
    export.add_argument("--name", help="name to publish under; the model's own by default")
    export.add_argument(
        "--weights",
        choices=("float32", "float16", "int8", "int4"),
        default="float32",
        help="what the matrices of a language model become; nothing is published when it predicts too much worse",
    )
    export.add_argument(
        "--held-out",
        type=Path,
        metavar="FILE",
        help="what that is judged on: a text a line, or JSONL with `text` or `messages`; "
        "the documentation of Python's library by default",
    )
    export.add_argument(
        "--most-loss",
        type=float,
        default=0.02,
        metavar="SHARE",
        help="that the perplexity may rise by (0.02)",
    )
    command("models", "list what can be fine-tuned and what is published")
    words = "make, list and revoke the API keys that requests need"
    keys = commands.add_parser("keys", help=words, description=words).add_subparsers(
        dest="key_command", required=True, metavar="COMMAND"
    )
    words = "make a key and print it, once"
    create = keys.add_parser("create", parents=[settings], help=words, description=words)
    create.add_argument("--name", required=True, help="whose it is")
    create.add_argument("--scopes", required=True, help="of infer, train, metrics, admin; comma between")
    for kind in ("requests", "tokens"):
        for period in ("minute", "day", "month"):
            create.add_argument(f"--{kind}-per-{period}", type=int, metavar="N", help=f"most {kind} a {period}")
    words = "list keys, and what they used in this day and month of UTC"
    keys.add_parser("list", parents=[settings], help=words, description=words)
    words = "let a key open nothing any more; running servers know within a second"
    revoke = keys.add_parser("revoke", parents=[settings], help=words, description=words)
    revoke.add_argument("key_id", metavar="ID", help="what the key begins with, e.g. esp_0a1b2c3d")
    command("config", "print every setting and where it comes from")
    return whole


def given_flags(parsed: argparse.Namespace) -> dict[str, Any]:
    return {field: value for field, value in vars(parsed).items() if field in FIELDS}


def config_file(flag: Path | None) -> Path | None:
    """--config, or ESPALIER_CONFIG, or espalier.toml in the working directory when it is there."""
    if flag is not None:
        return flag
    if os.environ.get(FILE_VARIABLE):
        return Path(os.environ[FILE_VARIABLE])
    usual = Path("espalier.toml")
    return usual if usual.is_file() else None


def serve(loaded: Loaded) -> int:
    from server.serve import serve

    return serve(loaded.settings)


def run_training_command(parsed: argparse.Namespace, loaded: Loaded) -> int:
    if importlib.util.find_spec("torch") is None:
        words = "needs the training packages; install them with `pip install 'espalier[train]'`"
        print(f"espalier {parsed.command}: {words}", file=sys.stderr)
        return 1
    module, _, function = TRAINING_COMMANDS[parsed.command].partition(":")
    run: Callable[..., int] = getattr(importlib.import_module(module), function)
    settings = loaded.settings
    try:
        if settings.repository_url:  # else the folder mirrors what it did: a server may run on it
            mirror(settings.repository, settings.repository_url)
    except OSError as error:
        print(f"espalier {parsed.command}: repository_url: {error}", file=sys.stderr)
        return 2
    if parsed.command == "finetune":
        return run(parsed.recipe, home=settings.home, repository=settings.repository, backbones=settings.backbones)
    return run(
        parsed.model,
        name=parsed.name,
        weights=parsed.weights,
        held_out=parsed.held_out,
        most_loss=parsed.most_loss,
        repository=settings.repository,
        backbones=settings.backbones,
    )


def models(loaded: Loaded) -> int:
    from rich.console import Console
    from rich.table import Table

    from server.routes.models import listing

    try:
        found = listing(loaded.settings)
    except OSError as error:
        print(f"espalier models: {error}", file=sys.stderr)
        return 1
    table = Table("model", "status", "reads", "task", "versions", "aliases", "traffic", "what it is")
    for model in found:
        versions = ", ".join(str(one.version) for one in model.versions)
        aliases = ", ".join(f"{alias} = {version}" for alias, version in model.aliases.items())
        traffic = ", ".join(f"{version}: {share:.0%}" for version, share in model.traffic.items())
        modality, task = model.modality or "?", model.task or ""
        table.add_row(model.id, model.status, modality, task, versions, aliases, traffic, model.description)
    Console().print(table)
    return 0


def config(loaded: Loaded) -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table("setting", "value", "from", "what it is")
    for field, annotation in FIELDS.items():
        value = getattr(loaded.settings, field)
        table.add_row(field, str(value), loaded.sources[field], typing.get_args(annotation)[1].description)
    Console().print(table)
    return 0
