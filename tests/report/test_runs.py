"""Runs are found, read and grouped; tables and the Pareto picture show them, broken ones included."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dyndet.errors import UserError
from dyndet.report.runs import Run, collect_runs, compute_number, differences, group_runs
from dyndet.report.tables import markdown_table, metric_label, pareto_front, pareto_plot, report_table

CSV = """epoch,macs/head_ratio,step,train/loss,val/AP,val/AP50
0,,9,2.5,,
0,0.9,19,,0.2,0.4
1,,29,1.5,,
1,,39,1.25,,
1,,39,,0.3,0.5
1,0.7,39,,,
2,,49,0.5,,
"""


def make(folder: Path, overrides: list[str], result: dict[str, float] | None = None, config: str = "seed: 0\n") -> Path:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(config)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {item}\n" for item in overrides) or "[]\n")
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def log(folder: Path, text: str = CSV, name: str = "csv/version_0") -> Path:
    path = folder / name / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def numbers(ap: float, ratio: float) -> dict[str, float]:
    return {"val/AP": ap, "macs/head_ratio": ratio, "macs/head_used_mean": ratio * 2e9}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two weights, two seeds each."""
    for index, (weight, seed, ap, ratio) in enumerate(
        [(0.1, 0, 0.40, 0.5), (0.1, 1, 0.42, 0.6), (1, 0, 0.30, 0.1), (1, 1, 0.34, 0.1)]
    ):
        overrides = ["+experiment=bccd_dyn", f"seed={seed}", f"budget.weight={weight}"]
        make(tmp_path / str(index), overrides, numbers(ap, ratio))
    return tmp_path


def test_result_file_wins_over_the_log(tmp_path: Path) -> None:
    log(make(tmp_path / "0", ["seed=3"], {"val/AP": 0.5}))
    assert collect_runs(tmp_path) == [Run(tmp_path / "0", {"seed": "3"}, {"val/AP": 0.5})]


def test_last_validation_with_the_other_rows_of_its_step(tmp_path: Path) -> None:
    log(make(tmp_path, []))
    (run,) = collect_runs(tmp_path)
    expected = {"val/AP": 0.3, "val/AP50": 0.5, "macs/head_ratio": 0.7, "train/loss": 1.25, "epoch": 1, "step": 39}
    assert run.metrics == expected
    assert run.problem == ""


def test_newest_log_with_a_validation_is_read(tmp_path: Path) -> None:
    make(tmp_path, [])
    old = log(tmp_path)
    new = log(tmp_path, CSV.replace("0.3,0.5", "0.8,0.9"), "csv/version_1")
    just_begun = log(tmp_path, "epoch,step,train/loss\n0,9,2.0\n", "csv/version_2")
    for age, path in enumerate((just_begun, new, old)):
        os.utime(path, (1e9 - age, 1e9 - age))
    assert collect_runs(tmp_path)[0].metrics["val/AP"] == 0.8


def test_runs_inside_runs_keep_their_own_numbers(tmp_path: Path) -> None:
    outer = make(tmp_path / "outer", ["a=1"])
    log(make(outer / "inner", ["a=2"]))
    runs = {run.folder.name: run for run in collect_runs(tmp_path)}
    assert runs["inner"].metrics["val/AP"] == 0.3
    assert runs["outer"].problem == "no validation yet" and not runs["outer"].metrics


def test_overrides_are_settings(tmp_path: Path) -> None:
    make(tmp_path, ["+experiment=x", "++a.b=c=d", "~callbacks.progress", "data.root=${oc.env:NOT_SET}"], {"val/AP": 1})
    assert collect_runs(tmp_path)[0].settings == {
        "experiment": "x", "a.b": "c=d", "~callbacks.progress": "", "data.root": "${oc.env:NOT_SET}",
    }  # fmt: skip


def test_order_is_natural_and_results_without_hydra_count(tmp_path: Path) -> None:
    for name in ("10", "2", "1"):
        make(tmp_path / name, [], {"val/AP": 0.1})
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "result.json").write_text('{"val/AP": 0.2, "note": "text", "flag": true}')
    runs = collect_runs(tmp_path)
    assert [run.folder.name for run in runs] == ["1", "2", "10", "plain"]
    assert runs[-1].metrics == {"val/AP": 0.2} and runs[-1].settings == {"folder": "plain"}


@pytest.mark.parametrize(
    ("trainer", "problem"),
    [
        ("{max_epochs: 2, max_steps: -1}", ""),
        ("{max_epochs: 8}", "unfinished: epoch 2 of 8"),
        ("{max_epochs: 8, max_steps: 40}", ""),
        ("{max_epochs: 8, max_steps: 90}", "unfinished: epoch 2 of 8"),
        ("{max_epochs: 3, check_val_every_n_epoch: 2}", ""),
        ("{max_epochs: '${epochs}'}", ""),
        ("{max_epochs: -1}", ""),
        ("{max_epochs: -1, max_steps: 40}", ""),
        ("{max_epochs: -1, max_steps: 90000}", "unfinished: step 39 of 90000"),
        ("[oops", "config.yaml cannot be read"),
    ],
)
def test_unfinished_runs_are_told_by_the_configuration(tmp_path: Path, trainer: str, problem: str) -> None:
    log(make(tmp_path, [], config=f"trainer: {trainer}\n"))
    (run,) = collect_runs(tmp_path)
    assert run.problem.startswith(problem) and bool(run.problem) == bool(problem)
    assert run.metrics["val/AP"] == 0.3


def test_broken_runs_are_listed(tmp_path: Path) -> None:
    make(tmp_path / "0", ["a=1"])
    (make(tmp_path / "1", ["a=2"]) / "result.json").write_text('{"val/AP": 0.')
    log(make(tmp_path / "2", ["a=3"]), "epoch,step,val/AP\n0,9,not a number\n")
    (make(tmp_path / "3", []) / ".hydra" / "overrides.yaml").write_text("- [unclosed")
    runs = collect_runs(tmp_path)
    assert [run.problem.split(" (")[0] for run in runs] == [
        "no validation yet", "numbers cannot be read", "numbers cannot be read", "overrides.yaml cannot be read",
    ]  # fmt: skip
    table = report_table(runs)
    assert all(run.problem.split(" (")[0] in table for run in runs)
    assert pareto_plot(runs, tmp_path / "pareto.png").is_file()


def test_empty_and_missing_folders_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a folder"):
        collect_runs(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no runs below .*\.hydra folder"):
        collect_runs(tmp_path)


def test_seeds_are_grouped(sweep: Path) -> None:
    groups = group_runs(collect_runs(sweep))
    assert [len(group.runs) for group in groups] == [2, 2]
    assert groups[0].mean("val/AP") == pytest.approx(0.41)
    assert groups[0].std("val/AP") == pytest.approx(0.02 / math.sqrt(2))
    assert math.isnan(groups[0].mean("val/none")) and math.isnan(groups[0].std("val/none"))
    assert differences(groups) == ["budget.weight"]
    assert len(group_runs(collect_runs(sweep), ignore=())) == 4


def test_unfinished_runs_do_not_enter_a_mean(sweep: Path) -> None:
    make(sweep / "4", ["+experiment=bccd_dyn", "seed=2", "budget.weight=1"], numbers(0.0, 0.1) | {"epoch": 0},
         "trainer: {max_epochs: 9}\n")  # fmt: skip
    groups = group_runs(collect_runs(sweep))
    assert [group.problem for group in groups] == ["", "", "unfinished: epoch 1 of 9"]
    assert groups[1].mean("val/AP") == pytest.approx(0.32)


def test_report_table(sweep: Path) -> None:
    make(sweep / "4", ["+experiment=bccd_dyn", "budget.weight=5"])
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in report_table(collect_runs(sweep)).split("\n")
    ]
    assert rows[0] == ["#", "budget.weight", "runs", "AP", "executed share of head MACs", "head GMAC", "status"]
    assert rows[2] == ["1", "0.1", "2", "0.410 ± 0.014", "55.0 ± 7.1%", "1.100 ± 0.141", "finished"]
    assert rows[3][1:4] == ["1", "2", "0.320 ± 0.028"]
    assert rows[4] == ["3", "5", "1", "", "", "", "no validation yet (4)"]


def test_mask_ap_has_a_column_where_a_run_has_masks(sweep: Path) -> None:
    assert "mask" not in report_table(collect_runs(sweep))
    make(sweep / "4", ["budget.weight=2"], numbers(0.5, 0.2) | {"val/segm/AP": 0.25, "val/segm/AP50": 0.75})
    make(sweep / "5", ["budget.weight=2", "seed=1"], numbers(0.5, 0.2) | {"val/segm/AP": 0.75})
    head, _, first, second, _ = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in report_table(collect_runs(sweep)).split("\n")
    )
    assert [name for name in head if "mask" in name] == ["mask AP"]
    assert first[head.index("mask AP")] == "0.500 ± 0.354" and second[head.index("mask AP")] == ""


def test_numbers_that_no_run_defines_have_no_column(tmp_path: Path) -> None:
    make(tmp_path / "0", ["a=1"], {"val/AP": 0.5, "val/segm/AP": math.nan, "macs/head_ratio": math.nan})
    log(make(tmp_path / "1", ["a=2"]), "epoch,step,val/AP,val/AP50,macs/head_ratio\n0,9,0.25,nan,nan\n")
    runs = collect_runs(tmp_path)
    assert [run.metrics for run in runs] == [
        {"val/AP": 0.5}, {"epoch": 0, "step": 9, "val/AP": 0.25},
    ]  # fmt: skip
    assert report_table(runs).split("\n")[0].replace("|", " ").split() == ["#", "a", "AP"]


def test_runs_without_gates_are_compared_by_all_their_macs(sweep: Path, tmp_path: Path) -> None:
    assert compute_number(collect_runs(sweep)) == "macs/head_ratio"
    make(tmp_path / "plain", ["a=1"], {"val/AP": 0.5, "macs/head_ratio": 1.0, "macs/total_mean": 1e9})
    make(tmp_path / "plain" / "yolo", ["a=2"], {"val/AP": 0.5, "macs/head_ratio": math.nan, "macs/total_mean": 2e9})
    assert compute_number(collect_runs(tmp_path / "plain")) == "macs/total_mean"


def test_single_run_is_named_by_its_folder(tmp_path: Path) -> None:
    runs = collect_runs(make(tmp_path / "only", ["a=1"], numbers(0.5, 0.2)).parent)
    assert "only" in report_table(runs)
    assert pareto_plot(runs, tmp_path / "pareto.png").is_file()


def test_markdown_table_is_aligned_and_escaped() -> None:
    table = markdown_table([{"name": "a|b", "AP": "0.5"}, {"name": "long name", "AP": ""}, {"AP": "-0.25"}])
    assert table.split("\n") == [
        "| name      |    AP |",
        "| --------- | ----: |",
        "| a\\|b      |   0.5 |",
        "| long name |       |",
        "|           | -0.25 |",
    ]
    assert markdown_table([{"a": 1, "b": 2}], ["b"]).split("\n")[2] == "|   2 |"


def test_labels_carry_units() -> None:
    assert metric_label("macs/head_used_mean") == "head GMAC"
    assert metric_label("macs/total_max") == "total GMAC (max)"
    assert metric_label("val/AP50") == "AP50"
    assert metric_label("val/segm/AP75") == "mask AP75"


@given(st.lists(st.tuples(st.integers(0, 9).map(float), st.integers(0, 9).map(float)), max_size=12))
def test_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    def beaten(one: tuple[float, float]) -> bool:
        return any(x <= one[0] and y >= one[1] and (x, y) != one for x, y in points)

    front = pareto_front(points)
    assert {points[index] for index in front} == {point for point in points if not beaten(point)}
    assert [points[index] for index in front] == sorted({points[index] for index in front})


def test_plot_marks_front_and_references(sweep: Path) -> None:
    runs = collect_runs(sweep)

    def count(path: Path, color: tuple[int, int, int]) -> int:
        with Image.open(path) as picture:
            assert picture.width > 1000
            return sum(number for number, found in picture.convert("RGB").getcolors(1 << 24) or [] if found == color)

    plain = pareto_plot(runs, sweep / "new" / "plain.png")
    alone = pareto_plot(runs[:2], sweep / "alone.png")
    lined = pareto_plot(runs, sweep / "lined.png", x="macs/head_used_mean", references={"static": 0.45})
    orange, ink = (217, 98, 43), (34, 34, 40)
    assert count(plain, orange) > 200 and count(alone, orange) == 0
    assert count(lined, ink) > count(plain, ink) + 300


def test_unknown_numbers_are_a_user_error(sweep: Path) -> None:
    with pytest.raises(UserError, match=r"no run has val/mAP; there are: .*val/AP"):
        pareto_plot(collect_runs(sweep), sweep / "pareto.png", y="val/mAP")
