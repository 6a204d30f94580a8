"""Bundles on object storage: a store in memory, one in a folder, and one that fails midway."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from export import bundle
from export.bundle import DamagedBundle
from export.storage import Storage, StorageError, mirror, pull, storage_of
from server.runtime.deployment import Deployment, Latest
from server.runtime.model import load
from server.runtime.remote_bundles import RemoteBundles
from server.settings import Settings
from tests.server.bundles import publish_constant


class Flaky(MemoryFileSystem):
    """Works until `left` calls that move content are used up."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    left = 1_000_000

    def spend(self) -> None:
        if Flaky.left <= 0:
            raise ConnectionResetError("the store hung up")
        Flaky.left -= 1

    def put_file(self, *arguments: Any, **options: Any) -> None:
        self.spend()
        super().put_file(*arguments, **options)

    def get_file(self, *arguments: Any, **options: Any) -> None:
        self.spend()
        super().get_file(*arguments, **options)

    def pipe_file(self, *arguments: Any, **options: Any) -> None:
        self.spend()
        super().pipe_file(*arguments, **options)


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    place = f"{tmp_path}/store" if request.param == "file" else f"{uuid4().hex}/models"
    return f"{request.param}://{place}"


@pytest.fixture
def flaky() -> str:
    Flaky.left = 1_000_000
    return f"flaky://{uuid4().hex}/models"


def mirroring(folder: Path, url: str) -> Path:
    folder.mkdir()
    mirror(folder, url)
    return folder


def test_what_is_published_into_a_mirror_is_in_the_store_and_comes_to_another(url: str, tmp_path: Path) -> None:
    here, there = mirroring(tmp_path / "here", url), mirroring(tmp_path / "there", url)
    assert publish_constant(here, "one", 1.0).version == 1
    assert publish_constant(there, "one", 2.0).version == 2
    assert {name: sorted(found.versions) for name, found in Storage(url).listing().items()} == {"one": [1, 2]}
    assert bundle.versions(here, "one") == [1]
    pull(here, ["one", "nothing", "one:9"])
    assert bundle.versions(here, "one") == [1, 2]
    assert bundle.verify(here / "one" / "2") == bundle.verify(there / "one" / "2")
    loaded = load(here / "one" / "2", Settings(home=tmp_path), Deployment())
    assert loaded.session is not None
    assert loaded.session.run({"vector": np.zeros((1, 2), np.float32)}, ["value"])[0].item() == 2.0


def test_of_many_publishers_at_once_each_gets_a_version_of_its_own(url: str, tmp_path: Path) -> None:
    folders = [mirroring(tmp_path / str(i), url) for i in range(6)]
    ready = threading.Barrier(6)

    def publish(i: int) -> tuple[int, float]:
        ready.wait()
        return publish_constant(folders[i], "one", float(i)).version, float(i)

    with ThreadPoolExecutor(6) as threads:
        published = dict(threads.map(publish, range(6)))
    assert sorted(published) == [1, 2, 3, 4, 5, 6]
    storage, fresh = Storage(url), tmp_path / "fresh"
    for version, number in published.items():
        folder = storage.fetch("one", version, fresh)
        session = load(folder, Settings(home=tmp_path), Deployment()).session
        assert session is not None
        assert session.run({"vector": np.zeros((1, 2), np.float32)}, ["value"])[0].item() == number


@pytest.mark.parametrize("calls", range(4))
def test_an_upload_that_breaks_off_is_never_seen(flaky: str, tmp_path: Path, calls: int) -> None:
    folder = mirroring(tmp_path / "here", flaky)
    publish_constant(folder, "one", 1.0)
    Flaky.left = calls
    if calls < 3:  # the claim, the graph, the manifest
        with pytest.raises(StorageError, match="the store hung up"):
            publish_constant(folder, "one", 2.0)
        assert bundle.versions(folder, "one") == [1]
        assert sorted(Storage(flaky).listing()["one"].versions) == [1]
    Flaky.left = 1_000_000
    publish_constant(folder, "one", 3.0)
    found = Storage(flaky)
    for version in found.listing()["one"].versions:
        bundle.verify(found.fetch("one", version, tmp_path / "fresh"))


def test_a_download_that_breaks_off_leaves_nothing_and_is_done_again(flaky: str, tmp_path: Path) -> None:
    publish_constant(mirroring(tmp_path / "here", flaky), "one", 1.0)
    other = tmp_path / "other"
    Flaky.left = 0
    with pytest.raises(StorageError, match="the store hung up"):
        Storage(flaky).fetch("one", 1, other)
    assert bundle.names(other) == []
    Flaky.left = 1
    bundle.verify(Storage(flaky).fetch("one", 1, other))


def test_a_file_that_is_wrong_there_is_no_bundle_here(url: str, tmp_path: Path) -> None:
    publish_constant(mirroring(tmp_path / "here", url), "one", 1.0)
    storage = Storage(url)
    storage.write("one/1/model.onnx", b"no graph")
    with pytest.raises(DamagedBundle, match="sha256"):
        storage.fetch("one", 1, tmp_path / "other")
    assert bundle.names(tmp_path / "other") == []


def test_a_version_that_was_replaced_is_fetched_anew(url: str, tmp_path: Path) -> None:
    first, second = mirroring(tmp_path / "first", url), tmp_path / "second"
    second.mkdir()
    publish_constant(first, "one", 1.0)
    publish_constant(second, "one", 2.0)
    storage = Storage(url)
    for file in ("model.onnx", "manifest.json"):
        storage.write(f"one/1/{file}", (second / "one" / "1" / file).read_bytes())
    folder = storage.fetch("one", 1, first)
    assert (folder / "model.onnx").read_bytes() == (second / "one" / "1" / "model.onnx").read_bytes()


def test_deployments_lie_in_the_store(url: str, tmp_path: Path) -> None:
    publish_constant(mirroring(tmp_path / "here", url), "one", 1.0)
    bundles = RemoteBundles(url, tmp_path / "there")
    assert bundles.deployment("one") == Deployment()
    assert bundles.look(())["one"].deployment is None
    new = Deployment(versions=Latest(2), aliases={"production": 1})
    assert bundles.deploy("one", new, instead_of=Deployment())
    assert not bundles.deploy("one", Deployment(), instead_of=Deployment())
    assert RemoteBundles(url, tmp_path / "other").deployment("one") == new
    assert bundles.look(())["one"].deployment is not None


def test_what_cannot_be_opened_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="colour://red: Protocol not known: colour"):
        Storage("colour://red")
    with pytest.raises(StorageError, match="colour://red"):
        mirror(tmp_path, "colour://red")
    assert storage_of(tmp_path) is None
    mirror(tmp_path, "memory://red")
    assert storage_of(tmp_path) is not None
    mirror(tmp_path, "")
    assert storage_of(tmp_path) is None
