from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from export.bundle import read_manifest
from server.cli import main
from server.settings import FIELDS
from tests.server.bundles import publish_vectors
from tests.server.conftest import VECTORS

ESPALIER = str(Path(sys.executable).parent / "espalier")

RECIPE = """\
model:
  architecture: mlp
  hyperparameters: {hidden: [16]}
training_file: points.csv
name: points
seed: 1
hyperparameters:
  n_epochs: 5
  learning_rate: 0.01
optimizer:
  type: sgd
  momentum: 0.9
"""


@pytest.fixture(autouse=True)
def _nothing_of_ours_around(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No ESPALIER_* variables, and a working directory without espalier.toml."""
    for name in [name for name in os.environ if name.startswith("ESPALIER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def test_config_says_where_each_setting_comes_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ESPALIER_QUEUE_LIMIT", "7")
    write(tmp_path / "espalier.toml", "max_body_bytes = 1234\n")
    assert main(["config", "--port", "9000"]) == 0
    lines = {words[0]: words[1:] for line in capsys.readouterr().out.splitlines() if (words := line.split("│")[1:])}
    told = {name.strip(): [word.strip() for word in words[:2]] for name, words in lines.items()}
    assert told["port"] == ["9000", "--port"]
    assert told["queue_limit"] == ["7", "ESPALIER_QUEUE_LIMIT"]
    assert told["max_body_bytes"] == ["1234", "espalier.toml"]
    assert told["host"] == ["127.0.0.1", "default"]
    assert set(FIELDS) <= told.keys()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["config", "--port", "many"], "--port: Expected `int`"),
        (["config", "--config", "absent.toml"], "absent.toml: cannot be read"),
        (["serve", "--log-level", "loud"], "--log-level: Invalid enum value 'loud'"),
    ],
)
def test_a_wrong_setting_ends_with_words(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_variable_that_means_nothing_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPALIER_PROT", "9000")
    assert main(["config"]) == 0
    assert "ESPALIER_PROT is no setting" in capsys.readouterr().err


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_models_lists_what_is_published_and_what_can_be_trained(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    publish_vectors(tmp_path / "repository")
    assert main(["models", "--home", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "points" in out
    assert "published" in out
    assert "minilm-l6-v2" in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("momentum: 0.9", "momentum: 9"), "recipe.yaml:12: optimizer.momentum: Expected `float` <= 1.0"),
        (("momentum: 0.9", "momentun: 0.9"), "recipe.yaml:12: optimizer.momentun: Object contains unknown field"),
        (("seed: 1", "seed: [1"), "recipe.yaml:7"),
        (("training_file: points.csv\n", ""), "missing required field `training_file`"),
        (("points.csv", "absent.csv"), "training_file: there is no file"),
    ],
)
def test_a_recipe_that_is_wrong_is_named_with_its_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, change: tuple[str, str], words: str
) -> None:
    (tmp_path / "points.csv").write_bytes(VECTORS)
    recipe = write(tmp_path / "recipe.yaml", RECIPE.replace(*change))
    assert main(["finetune", str(recipe), "--home", str(tmp_path)]) == 2
    assert words in capsys.readouterr().out


def test_data_that_cannot_be_learned_from_end_with_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_bytes(b"x,y,label\n1,2,a\n2,3,a\n")
    recipe = write(tmp_path / "recipe.yaml", RECIPE)
    assert main(["finetune", str(recipe), "--home", str(tmp_path)]) == 1
    assert "only one class" in capsys.readouterr().out


@pytest.mark.slow
def test_finetune_publishes_what_it_trained(tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_bytes(VECTORS)
    recipe = write(tmp_path / "recipe.yaml", RECIPE)
    command = [ESPALIER, "finetune", str(recipe), "--home", str(tmp_path / "home")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = read_manifest(tmp_path / "home" / "repository" / "points" / "1")
    assert manifest.labels == ["above", "below"]
    assert "points version 1" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_finetune_goes_on_after_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_bytes(VECTORS)
    long = RECIPE.replace("n_epochs: 5", "n_epochs: 300\n  batch_size: 1") + "checkpoint_seconds: 0.2\n"
    recipe = write(tmp_path / "recipe.yaml", long)
    command = [ESPALIER, "finetune", str(recipe), "--home", str(tmp_path / "home")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while not list((tmp_path / "home" / "runs").glob("*/checkpoints/*")):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "goes on from the last checkpoint" in " ".join(told.split())
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "going on from the checkpoint of step" in " ".join(again.stdout.split())


@pytest.mark.slow
def test_export_publishes_a_backbone_as_it_is(tmp_path: Path) -> None:
    command = [ESPALIER, "export", "minilm-l6-v2", "--name", "sentences", "--home", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_manifest(tmp_path / "repository" / "sentences" / "1").task == "embedding"
