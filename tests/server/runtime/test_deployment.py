"""How a model is served, as a file beside its versions."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.runtime.deployment import (
    DEPLOYMENT,
    All,
    Cache,
    Deployment,
    DeploymentError,
    Latest,
    Named,
    Shadow,
    decoded,
    encoded,
    read,
    write,
)

versions = st.integers(1, 1000)
deployments = st.builds(
    Deployment,
    versions=st.builds(Latest, versions) | st.just(All()) | st.builds(Named, st.lists(versions, min_size=1)),
    aliases=st.dictionaries(st.from_regex(r"[A-Za-z][A-Za-z0-9._-]{0,9}", fullmatch=True), versions),
    traffic=st.dictionaries(versions.map(str), st.floats(0.01, 100)),
    shadow=st.none() | st.builds(Shadow, versions, st.floats(0.01, 1.0)),
    cache=st.none() | st.builds(Cache, st.floats(1, 100), versions),
    lazy=st.booleans(),
)


@given(deployments)
def test_what_is_written_is_read(deployment: Deployment) -> None:
    assert decoded(encoded(deployment), "here") == deployment


def test_a_file_is_replaced_whole_and_without_one_everything_is_by_default(tmp_path: Path) -> None:
    assert read(tmp_path) == Deployment()
    write(tmp_path, Deployment(aliases={"production": 3}))
    write(tmp_path, Deployment(versions=Latest(2), lazy=True))
    assert read(tmp_path) == Deployment(versions=Latest(2), lazy=True)
    assert [path.name for path in tmp_path.iterdir()] == [DEPLOYMENT]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"aliases": {"production": 0}}', r"\$\.aliases"),
        ('{"aliases": {"1st": 1}}', "aliases: '1st': letters"),
        ('{"traffic": {"newest": 1}}', "traffic: 'newest' is no version"),
        ('{"traffic": {"1": 0.0}}', "traffic: no share above 0"),
        ('{"versions": {"policy": "newest"}}', r"Invalid value 'newest' - at `\$\.versions\.policy`"),
        ('{"shadow": {"version": 2, "share": 1.5}}', r"`float` <= 1\.0 - at `\$\.shadow\.share`"),
        ('{"colour": 1}', "unknown field `colour`"),
        ('{"max_batch_size": 4, "preferred_batch_sizes": [8]}', "preferred_batch_sizes: 8 is above max_batch_size 4"),
        ("{", "truncated"),
    ],
)
def test_a_wrong_file_is_named_with_its_field(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / DEPLOYMENT).write_text(content)
    with pytest.raises(DeploymentError, match=words) as raised:
        read(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path / DEPLOYMENT}: ")
