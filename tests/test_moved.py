"""Scripts that import from where modules lay once go on, and are told the new place."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.util import find_spec

import pytest

from dyndet.moved import MOVED, OldPlaces


def test_every_new_place_is_there_and_no_old_one() -> None:
    for old, new in MOVED.items():
        assert find_spec(new) is not None, new
        with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
            spec = find_spec(old)
        assert spec is not None and isinstance(spec.loader, OldPlaces), f"{old} is a module of today"


def test_an_old_import_gives_the_same_objects() -> None:
    for name in [name for name in sys.modules if any(f"{name}.".startswith(f"{old}.") for old in MOVED)]:
        del sys.modules[name]
    with pytest.warns(DeprecationWarning) as caught:
        from dyndet.command import run  # pyright: ignore
        from dyndet.metrics.coco import CocoMetric  # pyright: ignore
        from dyndet.models.cascade.links import CompositeLinks  # pyright: ignore
    assert {"test_moved.py"} == {warning.filename.rpartition("/")[2] for warning in caught}
    from dyndet.cli import command
    from dyndet.metrics import average_precision
    from dyndet.models.dynamicdet import links

    assert (run, CocoMetric, CompositeLinks) == (command.run, average_precision.CocoMetric, links.CompositeLinks)
    assert average_precision.__spec__ is not None and average_precision.__spec__.name == average_precision.__name__


def test_what_never_was_is_not_found() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("dyndet.nothing", "dyndet.metrics.coco.nothing", "dyndet.models.yolo.nothing"):
            with pytest.raises(ModuleNotFoundError, match=r"nothing"):
                importlib.import_module(name)
    assert isinstance(sys.meta_path[-1], OldPlaces) or any(isinstance(finder, OldPlaces) for finder in sys.meta_path)
