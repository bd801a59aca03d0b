"""What became of a sweep's jobs, and which are not repeated; folders that nobody shares."""

from __future__ import annotations

import json
import math
import os
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from commands import forked
from dyndet.cli.folders import claim, resumed_run, run_folder
from dyndet.cli.jobs import close_sweep, fingerprint, job_files, run_job
from dyndet.errors import UserError
from dyndet.sealed import write_sealed

TINY = [
    "+experiment=shapes_dyn", "data.size=64", "data.train_images=8", "data.val_images=4", "data.batch_size=4",
    "trainer.accelerator=cpu", "trainer.max_epochs=1", "head.depth=1", "neck.channels=16", "head.norm_groups=4",
    "~callbacks.progress", "~callbacks.preview", "~callbacks.density",
]  # fmt: skip


def config_of(**keys: Any) -> DictConfig:
    return OmegaConf.create(
        {"again": False, "objective": None, "output_dir": "x", "lr": 1, "at": "${output_dir}/y"} | keys
    )


def run(folder: Path, config: DictConfig, outcome: dict[str, float] | BaseException) -> tuple[Any, int]:
    """What the job gave, and how often its task ran."""
    ran = []

    def task(config: DictConfig) -> dict[str, float]:
        ran.append(config)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    explain = lambda error: str(error) if isinstance(error, UserError) else None  # noqa: E731
    return run_job(task, config, folder, folder.parent, [f"lr={config.lr}"], explain), len(ran)


def status(folder: Path) -> str:
    return json.loads((folder / "job.json").read_text())["status"]


def test_what_is_done_is_not_repeated(tmp_path: Path) -> None:
    first, second = tmp_path / "monday", tmp_path / "tuesday"
    metrics = {"val/AP": 0.25, "macs/total_mean": 3.0}
    assert run(first / "0", config_of(), metrics) == (metrics, 1)
    assert run(second / "0", config_of(lr=2, output_dir="z"), metrics) == (metrics, 1)  # another job
    assert run(second / "1", config_of(output_dir="z"), {}) == (metrics, 0)
    assert [status(second / name) for name in "01"] == ["done", "skipped"]
    assert run(first / "0", config_of(), {}) == (metrics, 0)  # the same folder again: its record stays
    assert status(first / "0") == "done"
    assert run(second / "2", config_of(again=True), {}) == ({}, 1)
    without = config_of()
    del without["again"]  # commands that always run
    assert run(second / "3", without, {}) == ({}, 1)


def test_a_failed_job_is_written_down_and_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "s" / "0", config_of(), UserError("too much")) == (None, 1)
    assert run(tmp_path / "s" / "1", config_of(lr=2), ZeroDivisionError("by zero")) == (None, 1)
    assert run(tmp_path / "s" / "2", config_of(lr=3), {"val/AP": 0.5}) == ({"val/AP": 0.5}, 1)
    (tmp_path / "s" / "3").mkdir()
    (tmp_path / "s" / "3" / "job.json").write_text('{"status": "running", "overrides": ["lr=4"]}')
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        close_sweep(tmp_path / "s")
    printed = capsys.readouterr().out
    assert left.value.code == 1
    for words in ("lr=3", "0.500", "job 0: too much", "job 1: ZeroDivisionError: by zero", "job 3: it ended without"):
        assert words in printed
    assert run(tmp_path / "s" / "0", config_of(), {"val/AP": 0.5})[1] == 1


def test_what_a_sweeper_gets(tmp_path: Path) -> None:
    metrics = {"val/AP": 0.25, "macs/total_mean": 3.0}
    assert run(tmp_path / "s" / "0", config_of(objective="val/AP"), metrics)[0] == 0.25
    both = config_of(objective=["val/AP", "macs/total_mean"])
    assert run(tmp_path / "s" / "1", both, metrics)[0] == (0.25, 3.0)  # of the first: what is asked for does not count
    assert run(tmp_path / "s" / "2", config_of(objective=["val/AP", "macs/total_mean"], lr=5), UserError("no"))[
        0
    ] == pytest.approx((math.nan,) * 2, nan_ok=True)
    value, _ = run(tmp_path / "s" / "3", config_of(objective="val/ap", lr=6), metrics)
    job = json.loads((tmp_path / "s" / "3" / "job.json").read_text())
    assert math.isnan(value) and job["status"] == "done" and job["metrics"] == metrics  # what was trained is kept
    assert "objective=val/ap: no such number" in job["error"]
    assert run(tmp_path / "s" / "4", config_of(objective="val/AP", lr=6), {}) == (0.25, 0)
    without = config_of(objective="val/AP", lr=7)
    for ran in (1, 0):  # no objects, no number: known, but not a number
        value, times = run(tmp_path / "s" / "5", without, {"val/AP": math.nan})
        assert math.isnan(value) and times == ran and "error" not in json.loads((tmp_path / "s/5/job.json").read_text())
    value, times = run(tmp_path / "s" / "6", config_of(objective=3, lr=8), metrics)
    assert math.isnan(value) and times == 0


def test_a_fingerprint_is_of_what_is_computed() -> None:
    same = fingerprint(config_of(), "train")
    assert fingerprint(config_of(again=True, objective="val/AP", output_dir="elsewhere"), "train") == same
    assert len({same, fingerprint(config_of(lr=2), "train"), fingerprint(config_of(), "evaluate")}) == 3


@pytest.mark.parametrize("name", ["start.ckpt", "data/labels/a.txt"])
def test_a_job_is_another_when_what_it_names_was_changed(tmp_path: Path, name: str) -> None:
    config = config_of(init=str(tmp_path / "start.ckpt"), data={"root": str(tmp_path / "data")})
    marks = [fingerprint(config, "train")]  # nothing is there yet
    for content in ("one", "another"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
        marks.append(fingerprint(config, "train"))
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "images" / "a.jpg").touch()
    assert len(set(marks)) == 3 and fingerprint(config, "train") == marks[2]


def test_jobs_that_end_with_a_code_stop_no_other(tmp_path: Path) -> None:
    assert run(tmp_path / "s" / "0", config_of(), SystemExit(1)) == (None, 1)
    assert status(tmp_path / "s" / "0") == "failed"
    with pytest.raises(SystemExit):
        run(tmp_path / "s" / "1", config_of(), SystemExit(143))


def test_a_sweep_is_closed_by_its_own_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a folder that is used again, whatever the depth at which jobs lie."""
    sweep = tmp_path / "s"
    with pytest.raises(SystemExit):
        close_sweep(sweep)
    run(sweep / "a" / "0", config_of(), UserError("too much"))
    run(sweep / "a" / "1", config_of(lr=2), {"val/AP": 0.5})
    with pytest.raises(SystemExit):
        close_sweep(sweep, repeats=True)
    assert "a/0: too much" in (printed := capsys.readouterr().out) and "the same command runs these again" in printed
    before = job_files(sweep)
    run(sweep / "a" / "1", config_of(lr=2), {})  # skipped, and of this sweep
    close_sweep(sweep, stale=before)
    assert "a/0" not in capsys.readouterr().out


@pytest.mark.slow
def test_folders_that_refer_to_the_job(tmp_path: Path) -> None:
    subdir = "hydra.sweep.subdir='s/${hydra.job.num}_${hydra.job.override_dirname}'"
    result = forked(tmp_path, "report", "-m", "runs=a,b", "out=x_${y}", subdir)
    assert result.returncode == 1 and "2 of 2 jobs failed" in result.stdout, result.stderr
    assert "a is not a folder" in result.stdout and "Warning" not in result.stderr


def test_no_two_runs_have_one_folder(tmp_path: Path) -> None:
    """Eight processes that want the same folder at once have one each."""
    context = get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=lambda: queue.put(claim(tmp_path / "name" / "now"))) for _ in range(8)]
    for process in processes:
        process.start()
    claimed = {queue.get(timeout=60).name for _ in processes}
    for process in processes:
        process.join()
    assert claimed == {"now", *(f"now_{number}" for number in range(2, 9))}
    assert {path.name for path in (tmp_path / "name").iterdir()} == claimed


def test_a_resumed_run_goes_on_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_folder("x", "now", None) == run_folder("x", "now", "last") == os.path.join("outputs", "x", "now")  # noqa: PTH118
    Path("outputs/x/then/checkpoints").mkdir(parents=True)
    write_sealed({"global_step": 3}, "outputs/x/then/checkpoints/last.ckpt")
    assert run_folder("x", "now", "last") == str(Path("outputs/x/then"))
    assert resumed_run("y", "outputs/x/then/checkpoints/last.ckpt") == Path("outputs/x/then")
    assert resumed_run("y", "weights.ckpt") is None
    assert resumed_run("y", "nowhere/run/checkpoints/last.ckpt") is None
    Path("outputs/a[b]/then/checkpoints").mkdir(parents=True)
    write_sealed({"global_step": 3}, "outputs/a[b]/then/checkpoints/last.ckpt")
    assert resumed_run("a[b]", "last") == Path("outputs/a[b]/then")


@pytest.mark.slow
def test_one_bad_job_stops_no_other(tmp_path: Path) -> None:
    """A sweep with a wrong value and one that diverges; then the repaired sweep, which trains what is missing."""
    steps = ["trainer.log_every_n_steps=1", "trainer.max_epochs=2"]
    result = forked(tmp_path, "train", *TINY, *steps, "optim.optimizer.lr=abc,1e9,1e-3", "-m")
    assert result.returncode == 1, result.stderr
    (sweep,) = tmp_path.glob("multirun/shapes_dyn/*")
    assert [status(sweep / name) for name in "012"] == ["failed", "failed", "done"]
    assert "job 0: optim.optimizer.lr must be a number, got 'abc'" in result.stdout
    assert "lower optim.optimizer.lr" in result.stdout and "Traceback" not in result.stderr
    result = forked(tmp_path, "train", *TINY, *steps, "optim.optimizer.lr=1e-3", "-m")
    assert result.returncode == 0, result.stderr
    (again,) = set(tmp_path.glob("multirun/shapes_dyn/*")) - {sweep}
    assert status(again / "0") == "skipped" and not (again / "0" / "result.json").exists()
