"""Looking through a repository folder."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.runtime.local_bundles import LocalBundles

read: list[str] = []
sys.addaudithook(lambda event, arguments: read.append(str(arguments[0])) if event == "os.scandir" else None)


@contextmanager
def folders_read() -> Iterator[Callable[[], list[str]]]:
    """What folders are read in the meantime."""
    before = len(read)
    yield lambda: read[before:]


def version(folder: Path, name: str, number: int) -> None:
    """Enough of a bundle to be listed."""
    place = folder / name / str(number)
    place.mkdir(parents=True)
    (place / "manifest.json").write_text("{}")


def settle(folder: Path) -> None:
    """Let it be long ago that something changed."""
    old = time.time() - 60
    for one in [*folder.iterdir(), folder]:
        os.utime(one, (old, old))


@pytest.fixture
def bundles(tmp_path: Path) -> LocalBundles:
    for i in range(200):
        version(tmp_path, f"model-{i}", 1)
    settle(tmp_path)
    return LocalBundles(tmp_path)


def test_folders_that_have_not_changed_are_not_read_again(bundles: LocalBundles, tmp_path: Path) -> None:
    first = bundles.look(())
    assert len(first) == 200
    version(tmp_path, "model-7", 2)
    with folders_read() as found:
        second = bundles.look(())
        assert found() == [str(tmp_path), str(tmp_path / "model-7")]
    assert sorted(second["model-7"].versions) == [1, 2]
    assert all(second[name] is first[name] for name in first if name != "model-7")


def test_a_folder_that_changed_just_now_is_read_again(bundles: LocalBundles, tmp_path: Path) -> None:
    bundles.look(())
    version(tmp_path, "model-7", 2)
    bundles.look(())
    with folders_read() as found:
        bundles.look(())
        assert found() == [str(tmp_path), str(tmp_path / "model-7")]


def test_a_version_that_is_being_copied_is_seen_when_its_manifest_comes(bundles: LocalBundles, tmp_path: Path) -> None:
    (tmp_path / "model-3" / "2").mkdir()
    settle(tmp_path)
    assert sorted(bundles.look(())["model-3"].versions) == [1]
    (tmp_path / "model-3" / "2" / "manifest.json").write_text("{}")
    assert sorted(bundles.look(())["model-3"].versions) == [1, 2]


def test_a_deployment_that_is_edited_in_place_is_seen(bundles: LocalBundles, tmp_path: Path) -> None:
    file = tmp_path / "model-3" / "deployment.json"
    file.write_text("{}")
    settle(tmp_path)
    before = bundles.look(())["model-3"].deployment
    file.write_text('{"lazy": true}')
    os.utime(tmp_path / "model-3", (time.time() - 60,) * 2)
    after = bundles.look(())["model-3"].deployment
    assert before is not None
    assert after is not None
    assert before != after


def test_what_is_no_model_is_passed_over(bundles: LocalBundles, tmp_path: Path) -> None:
    (tmp_path / "README").write_text("models")
    (tmp_path / ".staging").mkdir()
    (tmp_path / "empty").mkdir()
    version(tmp_path, "model-0", 2)
    (tmp_path / "model-0" / "latest").symlink_to("2")
    assert len(found := bundles.look(())) == 200
    assert sorted(found["model-0"].versions) == [1, 2]
