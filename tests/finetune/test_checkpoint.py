"""Checkpoints on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune import checkpoint
from finetune.checkpoint import Checkpoint, Progress


def make(step: int, best_step: int = 0, run: str = "run") -> Checkpoint:
    progress = Progress(
        run=run,
        step=step,
        best=-0.1 if best_step else None,
        best_step=best_step,
        best_metrics={"loss": 0.1},
        loss_sum=1 / 3,
        curve=[{"step": 1.0, "train_loss": 0.7}],
    )
    best = {"weight": torch.full((2,), float(best_step))} if best_step else {}
    return Checkpoint(progress, {"weight": torch.full((2,), float(step))}, {"exp_avg:weight": torch.ones(2)}, best)


def load(folder: Path, run: str = "run") -> tuple[Checkpoint | None, list[str]]:
    complaints: list[str] = []
    return checkpoint.load(folder, run, complaints.append), complaints


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    saved = make(5, best_step=3)
    checkpoint.save(tmp_path, saved)
    found, complaints = load(tmp_path)
    assert found is not None
    assert complaints == []
    assert found.progress == saved.progress
    for one, other in zip(
        (found.weights, found.optimizer, found.best), (saved.weights, saved.optimizer, saved.best), strict=True
    ):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert load(tmp_path / "absent") == (None, [])


def test_the_last_two_stay_and_the_best_weights_that_they_name(tmp_path: Path) -> None:
    for step, best_step in ((1, 0), (2, 2), (3, 2), (4, 4), (5, 4)):
        checkpoint.save(tmp_path, make(step, best_step))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step-00000004", "step-00000005", "best-00000004.safetensors"}
    checkpoint.save(tmp_path, make(6, best_step=6))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step-00000005", "step-00000006", "best-00000004.safetensors", "best-00000006.safetensors"}


def test_only_tensors_and_json_are_written(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, make(5, best_step=5))
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert files == [
        "best-00000005.safetensors",
        "step-00000005/optimizer.safetensors",
        "step-00000005/state.json",
        "step-00000005/weights.safetensors",
    ]


@pytest.mark.parametrize(
    "file",
    [
        "step-00000005/weights.safetensors",
        "step-00000005/optimizer.safetensors",
        "step-00000005/state.json",
        "best-00000005.safetensors",
    ],
)
@pytest.mark.parametrize("damage", ["torn", "gone"])
def test_a_damaged_checkpoint_is_given_up_for_the_one_before(file: str, damage: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, make(4, best_step=3))
    checkpoint.save(tmp_path, make(5, best_step=5))
    place = tmp_path / file
    if damage == "gone":
        place.unlink()
    else:
        content = bytearray(place.read_bytes())
        content[len(content) // 2 :] = b""
        place.write_bytes(bytes(content))
    found, complaints = load(tmp_path)
    assert found is not None
    assert found.progress.step == 4
    assert float(found.best["weight"][0]) == 3.0
    assert len(complaints) == 1
    assert "checkpoint step-00000005 cannot be used" in complaints[0]

    checkpoint.save(tmp_path, make(5, best_step=5))  # the run does step 5 again
    found, complaints = load(tmp_path)
    assert found is not None
    assert (found.progress.step, complaints) == (5, [])


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, make(5)) / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    found, complaints = load(tmp_path)
    assert found is None
    assert complaints == ["checkpoint step-00000005 cannot be used: weights.safetensors is damaged"]


def test_checkpoints_of_another_run_are_not_gone_on_from(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, make(9, run="another"))
    found, complaints = load(tmp_path)
    assert found is None
    assert "another recipe or other data" in complaints[0]
    checkpoint.save(tmp_path, make(1))
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001"}


def test_what_a_killed_process_left_half_written_is_not_seen_and_goes_away(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, make(4))
    (tmp_path / ".half").mkdir()
    (tmp_path / ".half" / "weights.safetensors").write_bytes(b"half")
    found, complaints = load(tmp_path)
    assert found is not None
    assert (found.progress.step, complaints) == (4, [])
    checkpoint.save(tmp_path, make(5))
    assert not (tmp_path / ".half").exists()
