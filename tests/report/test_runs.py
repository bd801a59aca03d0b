"""Runs read back from folders, as a table and as a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from dyndet.errors import UserError
from dyndet.report.runs import collect_runs, group_by_seed
from dyndet.report.tables import pareto_front, pareto_plot, report_table


def write(root: Path, name: str, overrides: list[str], metrics: dict[str, float] | None) -> None:
    folder = root / name
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    if metrics is not None:
        (folder / "result.json").write_text(json.dumps(metrics))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for job, (weight, seed, ap, ratio) in enumerate([(0.1, 0, 0.40, 0.5), (0.1, 1, 0.44, 0.3), (1, 0, 0.30, 0.1)]):
        numbers = {"val/AP": ap, "val/AP50": 2 * ap, "macs/head_ratio": ratio, "macs/head_used_mean": ratio * 1e9}
        write(tmp_path, str(job), ["+experiment=x", f"budget.weight={weight}", f"seed={seed}"], numbers)
    write(tmp_path, "10", ["+experiment=x", "budget.weight=3"], None)
    return tmp_path


def test_runs_are_read_in_order_with_their_numbers(sweep: Path) -> None:
    runs = collect_runs(sweep)
    assert [run.folder.name for run in runs] == ["0", "1", "2", "10"]
    assert runs[0].overrides == {"experiment": "x", "budget.weight": "0.1", "seed": "0"}
    assert [run.finished for run in runs] == [True, True, True, False]
    with pytest.raises(UserError, match="no runs below"):
        collect_runs(sweep / "0" / "nothing")


def test_seeds_are_averaged_and_labels_name_the_difference(sweep: Path) -> None:
    first, second = group_by_seed(collect_runs(sweep))
    assert first.label == "budget.weight=0.1" and second.label == "budget.weight=1"
    assert first.mean("val/AP") == pytest.approx(0.42)
    assert first.spread("val/AP") == pytest.approx(0.04 / math.sqrt(2))
    assert second.spread("val/AP") == 0


def test_table(sweep: Path) -> None:
    lines = report_table(collect_runs(sweep)).splitlines()
    assert lines[0].startswith("| run | seeds | AP | AP50 |")
    assert lines[2].startswith("| budget.weight=1 | 1 | 0.300 | 0.600 | 0.100 | 10.0 |")  # least compute first
    assert lines[3].startswith("| budget.weight=0.1 | 2 | 0.420 ± 0.028 |")
    assert "10" in lines[-1] and "Without a validation" in lines[-1]


def test_numbers_come_from_the_csv_of_an_unfinished_run(tmp_path: Path) -> None:
    write(tmp_path, "0", [], None)
    (tmp_path / "0" / "csv").mkdir()
    (tmp_path / "0" / "csv" / "metrics.csv").write_text("step,val/AP,train/loss\n1,,2.5\n2,0.1,\n3,0.2,\n4,,1.5\n")
    (run,) = collect_runs(tmp_path)
    assert run.metrics == {"step": 3, "val/AP": 0.2}
    (tmp_path / "0" / "result.json").write_text('{"val/AP": 0.')  # ended while writing
    assert not collect_runs(tmp_path)[0].finished


def test_pareto_front() -> None:
    points = [(0.5, 0.4), (0.1, 0.2), (0.3, 0.4), (0.3, 0.1), (1.0, 0.39)]
    assert pareto_front(points) == [(0.1, 0.2), (0.3, 0.4)]


def test_picture(sweep: Path, tmp_path: Path) -> None:
    with Image.open(pareto_plot(collect_runs(sweep), tmp_path / "pareto.png")) as picture:
        assert picture.size == (900, 600)
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50
