"""docs/adding-a-model.md, followed to the letter on a copy of the packages."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from export import bundle
from server.settings import Settings
from tests.server.conftest import running

ROOT = Path(__file__).parents[2]
PLACE = "    for card in (\n"


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray((pixels * 15.9).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
def test_the_documented_model_is_trained_exported_and_served(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "adding-a-model.md").read_text()
    file, card, recipe = (
        re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)[1]  # type: ignore[index]
        for kind in ("python", "text", "yaml")
    )
    for package in ("server", "models", "finetune", "export"):
        shutil.copytree(ROOT / package, tmp_path / package)
    (tmp_path / "models" / "cnn" / "squeezenet.py").write_text(file)
    catalog = tmp_path / "models" / "catalog.py"
    assert catalog.read_text().count(PLACE) == 1
    catalog.write_text(catalog.read_text().replace(PLACE, PLACE + card))

    digits = load_digits()
    with zipfile.ZipFile(tmp_path / "digits.zip", "w") as archive:
        for i in range(1000):
            archive.writestr(f"{digits.target[i]}/{i}.png", png(digits.images[i]))
    (tmp_path / "recipe.yaml").write_text(recipe)
    command = "import sys; from server.cli import main; sys.exit(main(['finetune', 'recipe.yaml', '--home', 'home']))"
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    manifest = bundle.verify(tmp_path / "home" / "repository" / "digits" / "1")
    assert manifest.model["architecture"] == "squeezenet"
    assert manifest.metrics["accuracy"] > 0.9
    with running(Settings(home=tmp_path / "home", port=0, worker=False)) as live:
        right = 0
        for i in range(1000, 1100):
            headers = {"content-type": "image/png"}
            answer = live.client.post("/v1/classify?model=digits", content=png(digits.images[i]), headers=headers)
            right += answer.json()["data"][0]["label"] == str(digits.target[i])
        assert right > 85
