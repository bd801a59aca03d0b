"""Goals are met, missed or not measured; the suites measure all of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import check_goals
import pytest
import yaml
from bench.cases import suite

GOALS: dict[str, Any] = yaml.safe_load(check_goals.GOALS.read_text())
CONV = {"mode": "conv", "device": "cpu", "dtype": "float32", "levels": "P3", "batch": 1, "channels": 256}


def record(density: float, ratio: float, **fields: Any) -> dict[str, Any]:
    return {
        **CONV, "impl": "auto", "mask": "blob", "macs_asked": None, "density": density, "ratio": ratio,
        "macs": density / 100, "ms_sparse": 10 / ratio, **fields,
    }  # fmt: skip


def run(tmp_path: Path, records: list[dict[str, Any]], *arguments: str) -> int:
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in records))
    return check_goals.main([str(file), *arguments])


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    return {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}


def test_pass_fail_and_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    met = [record(10, 7.5), record(20, 3.8), record(50, 1.6)]
    missed = [record(density, 1.2, dtype="bfloat16") for density in (10, 20)]
    assert run(tmp_path, met + missed) == 1
    table = lines(capsys)
    assert "PASS +" in table["C1"] and "7.5 at 10 %, 3.8 at 20 %, 1.6 at 50 %" in table["C1"]
    assert "FAIL" in table["C2"] and ">= 3.5 at 10 %, >= 2 at 20 %" in table["C2"]
    assert "not measured" in table["C3"]
    assert set(GOALS) <= set(table)


def test_what_is_missing_does_not_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, [record(10, 7.5)]) == 0
    assert "not measured" in lines(capsys)["C1"]


def test_a_part_that_misses_fails_whatever_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, [record(10, 2)]) == 1
    assert "FAIL" in lines(capsys)["C1"]


def test_a_margin_softens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [record(10, 3.1), record(20, 1.9), record(50, 0.8)]
    assert run(tmp_path, records, "--only", "C1") == 1
    assert run(tmp_path, records, "--only", "C1", "--margin", "0.6") == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(tmp_path, records, "--margin", "60")
    assert "--margin is a share" in capsys.readouterr().err


def test_counts_have_no_margin() -> None:
    spec = {"what": "", "where": {"mode": "conv"}, "measure": "launches", "better": "less", "must": 10}
    assert check_goals.check("G", spec, [record(10, 1, launches=11)], 0.6).status == "FAIL"
    assert check_goals.check("G", spec, [record(10, 1, launches=10)], 0.6).status == "PASS"
    assert check_goals.check("G", spec, [record(10, 1)], 0.6).status == "not measured"


def test_the_last_record_of_a_case_counts() -> None:
    again = [record(10, 1), record(20, 9), record(50, 9), record(10, 9)]
    assert check_goals.check("C1", GOALS["C1"], again).status == "PASS"


def test_the_worst_of_several_cases_counts() -> None:
    fields = [{"mode": "conv"}, {"mode": "block"}]
    spec = {"what": "", "where": fields, "measure": "time", "better": "less", "must": {100: 1.05}}
    both = [record(100, 1), record(100, 0.8, mode="block")]
    assert check_goals.check("C6", spec, both[:1]).status == "not measured"
    verdict = check_goals.check("C6", spec, both)
    assert verdict.status == "FAIL" and verdict.measured == {100: 1.25}


def test_order_of_times() -> None:
    falling = [record(density, 100 / density) for density in (5, 10, 20, 30, 50)]
    spec = GOALS["C7"] | {"where": CONV}
    assert check_goals.check("C7", spec, [*falling, record(100, 99)]).measured == {0: pytest.approx(1)}
    swapped = [*falling, record(30, 4.9), record(20, 3.4)]
    assert check_goals.check("C7", spec, swapped).status == "FAIL"


def test_spearman() -> None:
    assert check_goals.spearman([1, 2, 3], [30, 20, 10]) == pytest.approx(-1)
    assert check_goals.spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert check_goals.spearman([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
    assert check_goals.spearman([1, 1, 1], [1, 2, 3]) == 0


def test_crossover() -> None:
    assert check_goals.crossover([10, 40, 60], [4, 1.5, 0.5]) == pytest.approx(50)
    assert check_goals.crossover([10, 20], [0.9, 0.5]) == 0
    assert check_goals.crossover([10, 20], [3, 2]) == 20


def test_a_broken_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text("{}\n{oops\n")
    with pytest.raises(SystemExit):
        check_goals.main([str(file)])
    assert "records.jsonl, line 2 is no JSON" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        check_goals.main([str(tmp_path / "none.jsonl")])
    assert "none.jsonl" in capsys.readouterr().err


def test_the_suites_measure_every_goal() -> None:
    cases = [*suite("cpu"), *suite("gpu")]
    records = [
        asdict(case) | {"macs_asked": case.macs, "macs": case.density, "ratio": 1.0, "ms_sparse": case.density}
        | {"syncs": 0, "launches": 1}
        for case in cases
    ]  # fmt: skip
    statuses = {goal: check_goals.check(goal, spec, records).status for goal, spec in GOALS.items()}
    assert "not measured" not in statuses.values(), statuses
    assert set(GOALS) == {*(f"C{i}" for i in range(1, 8)), *(f"G{i}" for i in range(1, 10)), "H1", "H2", "T1"}
