"""`espalier keys create | list | revoke`, on the database of the settings; servers that run know within a second."""

from __future__ import annotations

import argparse
import sys
import time

import msgspec

from finetune.jobs.store import opened
from server.keys import KeyStore, Limits, Name, Scope, UnknownKey, Used, today
from server.settings import Settings


def run(parsed: argparse.Namespace, settings: Settings) -> int:
    """Returns the exit status; 2: the command line is wrong."""
    try:
        with opened(settings.database) as store:
            return {"create": create, "list": show, "revoke": revoke}[parsed.key_command](parsed, KeyStore(store))
    except (msgspec.ValidationError, UnknownKey) as error:
        print(f"espalier keys {parsed.key_command}: {error}", file=sys.stderr)
        return 2


def create(parsed: argparse.Namespace, keys: KeyStore) -> int:
    """The key alone goes to standard output, so that a script can take it."""
    scopes = msgspec.convert([scope.strip() for scope in parsed.scopes.split(",")], list[Scope])
    given = {field: getattr(parsed, field) for field in Limits.__struct_fields__}
    limits = msgspec.convert({field: limit for field, limit in given.items() if limit is not None}, Limits)
    secret, key = keys.create(msgspec.convert(parsed.name, Name), scopes, limits)
    print(f"key {key.id} for {key.name}; it is shown once and kept nowhere:", file=sys.stderr)
    print(secret)
    return 0


def show(parsed: argparse.Namespace, keys: KeyStore) -> int:
    from rich.console import Console
    from rich.table import Table

    found = keys.all()
    used = keys.usage(today(time.time()), [key.number for key in found])
    table = Table("id", "name", "scopes", "limits", "made", "state", "requests today", "tokens today", "this month")
    for key in found:
        spent = used.get(key.number, Used())
        limits = ", ".join(
            f"{limit} {field.replace('_', ' ')}" for field, limit in msgspec.to_builtins(key.limits).items()
        )
        table.add_row(
            *(key.id, key.name, ", ".join(key.scopes), limits or "none", today(key.created_at)),
            "revoked" if key.revoked_at else "valid",
            *(str(spent.day_requests), str(spent.day_tokens), f"{spent.month_requests}, {spent.month_tokens} tokens"),
        )
    Console().print(table)
    return 0


def revoke(parsed: argparse.Namespace, keys: KeyStore) -> int:
    key = keys.revoke(parsed.key_id)
    print(f"key {key.id} of {key.name} is revoked")
    return 0
