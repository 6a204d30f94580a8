"""The blocks of a transformers model, found by its structure, so that no family needs a list of its own."""

from __future__ import annotations

from torch import nn


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Blocks from the input to the output; every parameter is in exactly one.

    Walks the modules in the order of their registration, which in transformers is that of the computation, but for
    tables of embeddings beside a list of layers: they are read before it. A list of layers (or stages) gives one block
    an entry; whatever else holds parameters gives one block as a whole.
    """
    found: list[tuple[str, nn.Module]] = []

    def walk(prefix: str, module: nn.Module) -> None:
        for name, child in sorted(module.named_children(), key=lambda named: not isinstance(named[1], nn.Embedding)):
            path = f"{prefix}{name}"
            if not any(True for _ in child.parameters()):
                continue
            if isinstance(child, nn.ModuleList):
                found.extend((f"{path}.{i}", entry) for i, entry in enumerate(child))
            elif _holds_a_list(child):
                walk(f"{path}.", child)
            else:
                found.append((path, child))

    walk("", model)
    loose = [name for name, _ in model.named_parameters(recurse=False)]
    if loose:
        raise ValueError(f"{type(model).__name__} has parameters outside its modules: {', '.join(loose)}")
    return found


def _holds_a_list(module: nn.Module) -> bool:
    """Whether there is a list of layers below, and no parameter beside it that a block would leave out."""
    lists = any(isinstance(child, nn.ModuleList) for child in module.modules() if child is not module)
    return lists and not any(True for _ in module.parameters(recurse=False))
