"""What a GGUF file says of a decoder beside its tensors: configuration, tokenizer, ends and chat template.

GGUF is llama.cpp's format of one file for everything. transformers reads its tensors and most of its metadata; what it
would read otherwise than llama.cpp does, without a word, is put right here or refused.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer
from transformers.integrations.gguf import read_gguf_metadata
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Names of how a byte-level vocabulary splits words: as GPT-2's does, and the same with every digit alone.
AS_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo")
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")
# Of a configuration: where it was found, and what read it.
SAYS_WHERE = ("_name_or_path", "_model_name_or_path", "transformers_version")


def file_at(place: str) -> Path | None:
    """The GGUF file that a path or a folder without a config.json stands for; None where it is of another kind.

    Raises ValueError when there is no such file, or more than one in the folder.
    """
    path = Path(place)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"there is no file {place}")
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise ValueError(f"{place} holds {len(found)} GGUF files, {', '.join(one.name for one in found)}; name one")
    return found[0] if found else None


def config(path: Path) -> dict[str, Any]:
    """As config.json has it. Raises ValueError when it is no decoder that can be read."""
    return dict(_config(path, path.stat().st_mtime_ns))


@lru_cache(maxsize=8)
def _config(path: Path, changed: int) -> dict[str, Any]:
    """`changed`: when the file was; reading its vocabulary takes seconds."""
    metadata, tensors = _metadata(path)
    family = metadata["general.architecture"]
    scaling = metadata.get(f"{family}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise ValueError(
            f"{path}: its rotation is stretched ({scaling if scaling != 'none' else 'rope_freqs'}), which is not read "
            "from a GGUF file; give the Hugging Face folder of the model"
        )
    try:
        found: dict[str, Any] = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    except Exception as error:  # transformers raises what it likes on metadata that do not fit
        raise ValueError(f"{path}: a {family} cannot be read from a GGUF file: {error}") from error
    writer = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(found["model_type"])
    if writer is None:
        raise ValueError(f"{path}: a {family} is no decoder; only decoders are read from GGUF files")
    kept = {name: value for name, value in found.items() if name not in SAYS_WHERE}
    return {**kept, "architectures": [writer], "eos_token_id": ends(path) or None}


def tokenizer(path: Path) -> Tokenizer:
    """Raises ValueError for a vocabulary whose way to split words is not known."""
    metadata, _ = _metadata(path)
    split = metadata.get("tokenizer.ggml.pre", AS_GPT2[0])
    byte_level = metadata.get("tokenizer.ggml.model") == "gpt2"
    if byte_level and split not in (*AS_GPT2, *SINGLE_DIGITS, *GGUF_PRE_TOKENIZER_SPLITS):
        raise ValueError(
            f"{path}: its tokenizer splits words the way {split!r}, which is not known; give the Hugging Face folder "
            "of the model, whose tokenizer.json says how"
        )
    try:
        found: Tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer
    except Exception as error:  # as above
        raise ValueError(f"{path}: no tokenizer can be made of it: {error}") from error
    if byte_level and split in SINGLE_DIGITS:
        found.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return found


def ends(path: Path) -> list[int]:
    """Tokens that end a text, and a turn where that is another one."""
    metadata, _ = _metadata(path)
    named = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return list(dict.fromkeys(token for token in named if isinstance(token, int)))


def chat_template(path: Path) -> str | None:
    """Jinja; None where the model has not learned to chat."""
    template = _metadata(path)[0].get("tokenizer.chat_template")
    return template if isinstance(template, str) else None


def _metadata(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Values by name, and the names of the tensors; raises ValueError for what is no GGUF file."""
    try:
        metadata, tensors = read_gguf_metadata(str(path))
    except Exception as error:  # of a file that ends too early: struct, index and value errors
        raise ValueError(f"{path} is no GGUF file that can be read: {error}") from error
    return metadata, tensors
