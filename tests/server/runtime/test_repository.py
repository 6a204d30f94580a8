"""The repository: newest whole version, swapped without a failed request."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import numpy as np
import pytest

from server.metrics import Metrics
from server.runtime.repository import Repository, UnknownModel
from server.settings import Settings
from tests.server.bundles import publish_texts, publish_vectors


def repository(folder: Path, **settings: object) -> Repository:
    return Repository(Settings(home=folder, poll_seconds=0.05, **settings), Metrics())  # type: ignore[arg-type]


async def until_served(repository: Repository, name: str, version: int) -> None:
    for _ in range(400):
        if name in repository.models and repository.models[name].version == version:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{name} version {version} is not served")


def test_the_newest_version_is_loaded_and_named_versions_are_told_apart(tmp_path: Path) -> None:
    async def story() -> None:
        found = repository(tmp_path)
        publish_vectors(found.folder)
        publish_vectors(found.folder)
        await found.start()
        assert found.get("points").version == 2
        assert found.get("points:2") is found.get("points")
        with pytest.raises(UnknownModel, match="version 2 is served"):
            found.get("points:1")
        with pytest.raises(UnknownModel, match="served are: points"):
            found.get("lines")
        await found.stop()

    asyncio.run(story())


def test_a_damaged_version_is_refused_and_the_one_before_goes_on(tmp_path: Path) -> None:
    async def story() -> None:
        found = repository(tmp_path)
        publish_vectors(found.folder)
        await found.start()
        staged = tmp_path / "copy"
        shutil.copytree(found.folder / "points" / "1", staged)
        content = bytearray((staged / "model.onnx").read_bytes())
        content[-1] ^= 1
        (staged / "model.onnx").write_bytes(content)
        staged.rename(found.folder / "points" / "2")
        for _ in range(100):
            if len(found.index()) == 2:
                break
            await asyncio.sleep(0.02)
        await found.refresh()
        first, second = found.index()
        assert (first.version, first.state) == (1, "ready")
        assert (second.version, second.state) == (2, "unavailable")
        assert "model.onnx: sha256" in second.reason
        assert found.get("points").version == 1
        assert b'espalier_bundles_refused_total{model="points"} 1.0' in found.metrics.render()
        await found.stop()
        again = repository(tmp_path)
        await again.start()
        assert again.get("points").version == 1
        await again.stop()

    asyncio.run(story())


def test_a_swap_under_load_fails_no_request(tmp_path: Path) -> None:
    async def story() -> None:
        found = repository(tmp_path)
        publish_vectors(found.folder)
        await found.start()
        versions: set[int] = set()
        going = True

        async def client() -> None:
            while going:
                model = found.get("points")
                rows = np.float32([[0, 5], [0, -5]])
                answer = await model.submit(rows, "classify", deadline=float("inf")).future
                assert answer[0].argmax() == 0
                assert answer[1].argmax() == 1
                versions.add(model.version)
                await asyncio.sleep(0)

        clients = [asyncio.create_task(client()) for _ in range(8)]
        for version in range(2, 7):
            await asyncio.to_thread(publish_vectors, found.folder)
            await until_served(found, "points", version)
        while 6 not in versions:
            await asyncio.sleep(0.001)
        going = False
        await asyncio.gather(*clients)
        assert versions >= {1, 6}
        await found.stop()

    asyncio.run(story())


def test_a_model_that_is_removed_is_served_no_more(tmp_path: Path) -> None:
    async def story() -> None:
        found = repository(tmp_path)
        publish_vectors(found.folder)
        publish_texts(found.folder)
        await found.start()
        shutil.rmtree(found.folder / "points")
        for _ in range(100):
            if "points" not in found.models:
                break
            await asyncio.sleep(0.02)
        assert sorted(found.models) == ["days"]
        assert b'model_info{model="points"' not in found.metrics.render()
        await found.stop()

    asyncio.run(story())
