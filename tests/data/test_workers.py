"""How many processes load data."""

from __future__ import annotations

from typing import Any

import pytest

from dyndet.cli.compose import build, compose_experiment
from dyndet.data import workers
from dyndet.data.workers import loader_workers
from dyndet.errors import UserError


@pytest.mark.parametrize(("cores", "auto"), [(1, 0), (2, 1), (8, 7), (64, 8)])
def test_no_more_workers_than_cores(cores: int, auto: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "cores_here", lambda: cores)
    assert loader_workers("auto") == auto
    assert [loader_workers(asked) for asked in (0, 1, cores)] == [0, 1, cores]
    with pytest.warns(UserWarning, match=f"there are {cores} cores: {cores} are used"):
        assert loader_workers(cores + 1) == cores


def test_what_can_be_asked_for_by_key() -> None:
    config: Any = compose_experiment(None, ["data.num_workers=auto"])
    assert build(config.data.module).num_workers == loader_workers("auto")
    with pytest.raises(UserError, match=r"data.num_workers=-1: give a number"):
        build(compose_experiment(None, ["data.num_workers=-1"]).data.module)
    with pytest.raises(UserError, match=r"data.num_workers must be a whole number or one of auto, got 'all'"):
        build(compose_experiment(None, ["data.num_workers=all"]).data.module)
