from __future__ import annotations

from pathlib import Path

import pytest

from server.settings import FIELDS, Settings, SettingsError, flag_of, load, variable_of


def toml(folder: Path, text: str) -> Path:
    path = folder / "espalier.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_variables_and_variables_over_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, "port = 1\nqueue_limit = 2\nmax_body_bytes = 3\n")
    loaded = load({"port": "7"}, {"ESPALIER_PORT": "8", "ESPALIER_QUEUE_LIMIT": "9"}, path)
    assert (loaded.settings.port, loaded.settings.queue_limit, loaded.settings.max_body_bytes) == (7, 9, 3)
    assert loaded.sources["port"] == "--port"
    assert loaded.sources["queue_limit"] == "ESPALIER_QUEUE_LIMIT"
    assert loaded.sources["max_body_bytes"] == str(path)
    assert loaded.sources["host"] == "default"


def test_database_and_repository_follow_home(tmp_path: Path) -> None:
    settings = load({"home": str(tmp_path)}, {}).settings
    assert settings.database == f"sqlite:///{tmp_path}/espalier.db"
    assert settings.repository == tmp_path / "repository"


def test_given_database_and_repository_stay(tmp_path: Path) -> None:
    settings = load({"home": str(tmp_path), "database": "postgresql://db/x", "repository": "/models"}, {}).settings
    assert settings.database == "postgresql://db/x"
    assert settings.repository == Path("/models")


def test_lists_and_mappings_as_one_string() -> None:
    environ = {
        "ESPALIER_BACKBONES": "bert=/models/bert, vit = google/vit",
        "ESPALIER_PROVIDERS": '["CPUExecutionProvider"]',
    }
    settings = load({}, environ).settings
    assert settings.backbones == {"bert": "/models/bert", "vit": "google/vit"}
    assert settings.providers == ["CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("flags", "environ", "names"),
    [
        ({"port": "99999"}, {}, ["--port", "65535", "99999"]),
        ({"max_upload_bytes": "many"}, {}, ["--max-upload-bytes", "many"]),
        ({}, {"ESPALIER_WORKER": "perhaps"}, ["ESPALIER_WORKER", "perhaps"]),
        ({}, {"ESPALIER_LOG_LEVEL": "loud"}, ["ESPALIER_LOG_LEVEL", "loud"]),
        ({}, {"ESPALIER_BACKBONES": "bert"}, ["ESPALIER_BACKBONES", "name=value"]),
        ({}, {"ESPALIER_BACKBONES": "{bert"}, ["ESPALIER_BACKBONES", "malformed"]),
        ({}, {"ESPALIER_QUEUE_LIMIT": "0"}, ["ESPALIER_QUEUE_LIMIT", ">= 1"]),
    ],
)
def test_a_wrong_value_names_its_source(flags: dict[str, str], environ: dict[str, str], names: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load(flags, environ)
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("port = 'x'", ["port", "'x'"]),
        ("prot = 8000", ["'prot'", "known: host, port"]),
        ("port = = 1", ["not TOML", "line 1"]),
    ],
)
def test_a_wrong_file_names_the_key(tmp_path: Path, text: str, names: list[str]) -> None:
    path = toml(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        load({}, {}, path)
    for name in [str(path), *names]:
        assert name in str(caught.value)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"absent.toml: cannot be read: No such file"):
        load({}, {}, tmp_path / "absent.toml")


def test_variables_that_mean_nothing_are_told() -> None:
    assert load({}, {"ESPALIER_PROT": "1", "ESPALIER_PORT": "1", "HOME": "/"}).unknown == ["ESPALIER_PROT"]


def test_every_field_says_what_it_is() -> None:
    assert set(FIELDS) == set(Settings.__struct_fields__)
    assert all(annotation.__metadata__[0].description for annotation in FIELDS.values())
    assert (flag_of("max_body_bytes"), variable_of("max_body_bytes")) == ("--max-body-bytes", "ESPALIER_MAX_BODY_BYTES")
