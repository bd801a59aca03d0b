"""Every mode runs, checks itself and leaves records that the goals can be read from."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import bench.modes
import bench.timing
import bench_sparse
import pytest
import torch
import torch.nn.functional as F
from bench.cases import MODES, Case, defaults
from bench.modes import Scene, published_conv
from bench.reference import distance, poisoned, worst
from torch import Tensor

ROOT = Path(__file__).parents[2]
FIELDS = {
    "case", "density", "achieved", "dilated", "N", "path", "macs", "ms_dense", "ms_sparse", "ratio", "ratio_low",
    "ratio_high", "err", "env",
}  # fmt: skip


def smoke(*arguments: str) -> int:
    return bench_sparse.main(["--smoke", "--rounds", "1", *arguments])


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "subm"])
def test_a_mode_runs_and_is_right(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "records.jsonl"
    assert smoke("--mode", mode, "--density", "10,100", "--json", str(file)) == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["density"] for record in records] == [10, 100]
    for record in records:
        assert set(record) >= FIELDS
        assert record["err"] <= 1e-5 and record["ms_dense"] > 0 and record["ms_sparse"] > 0
        assert record["ratio_low"] <= record["ratio"] <= record["ratio_high"]
    assert records[0]["achieved"] == pytest.approx(10) and records[0]["dilated"] > 10
    assert records[0]["path"] == "gather" and records[1]["path"] == "dense"
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and len({line.count("|") for line in rows}) == 1


@pytest.mark.parametrize("arguments", [["--norm", "position"], ["--dtype", "bfloat16"], ["--mask", "iid"]])
@pytest.mark.parametrize("mode", ["block", "head"])
def test_variants_are_right(mode: str, arguments: list[str]) -> None:
    assert smoke("--mode", mode, "--density", "20", "--batch", "1,2", *arguments) == 0


@pytest.mark.parametrize("mode", ["conv", "train"])
def test_kernels_are_right(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Interpreted."""
    assert smoke("--mode", mode, "--density", "20", "--impl", "triton") == 0
    assert "| triton |" in capsys.readouterr().out


def test_it_runs_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    code = (
        "import sys, runpy;"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder)];"
        "sys.path[:] = [path for path in sys.path if not path.endswith('/src')];"
        "[sys.modules.__setitem__(name, None) for name in ('hydra', 'omegaconf', 'lightning', 'pycocotools', 'yaml')];"
        "sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]);"
        "sys.argv += ['--smoke', '--rounds', '1', '--density', '20', '--mode', 'head'];"
        "from contextlib import suppress\n"
        "with suppress(SystemExit): runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "import dyndet.kernels; print(dyndet.kernels.__file__)"
    )
    line = [sys.executable, "-c", code, str(ROOT / "scripts" / "bench_sparse.py")]
    done = subprocess.run(line, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "0 wrong, 0 failed, 0 not measured" in done.stdout
    assert Path(done.stdout.splitlines()[-1]).samefile(ROOT / "kernels" / "__init__.py")  # src/dyndet/kernels is a link


def test_a_suite_takes_one_mode(capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke("--suite", "cpu", "--mode", "train", "--norm", "position") == 0
    rows = capsys.readouterr().out.splitlines()
    assert [line.split("|")[2].strip() for line in rows if line.startswith("| train")] == ["10", "20"]


def test_a_share_of_multiply_adds_chooses_the_density(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    assert smoke("--mode", "block", "--macs", "0.23", "--json", str(file)) == 0
    (record,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert record["macs_asked"] == 0.23 and 10 < record["density"] < 20


def test_spconv_is_optional(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spconv_triton", None)
    assert smoke("--mode", "subm", "--device", "cpu", "--dtype", "float32", "--impl", "auto", "--density", "20") == 0
    assert "spconv-triton is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "fast"], "invalid choice: 'fast'"),
        (["--levels", "P9"], "unknown level 'P9': take P3"),
        (["--density", "10,x"], "numbers separated by commas, got '10,x'"),
        (["--density", "200"], "numbers from 0 to 100, got '200'"),
        (["--batch", "0"], "numbers from 1 to inf, got '0'"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--macs", "2"], "--macs is a share"),
        (["--suite", "cpu", "--mode", "subm"], "suite cpu has no cases of mode subm"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench_sparse.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("arguments", [["--device", "cuda"], ["--suite", "gpu"]])
def test_cuda_is_missed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_sparse.main(arguments)
    assert "need a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [1.001, float("nan")])
def test_a_wrong_result_is_an_error(
    fault: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right: Callable[..., Tensor] = bench.modes.conv
    monkeypatch.setattr(bench.modes, "conv", lambda *args, **options: right(*args, **options) * fault)
    assert smoke("--density", "20") == 1
    captured = capsys.readouterr()
    assert "WRONG" in captured.out and "1 wrong" in captured.out


def test_a_broken_case_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = bench_sparse.build

    def build(case: Case) -> object:
        if case.density == 10:
            raise RuntimeError("out of luck")
        return right(case)

    monkeypatch.setattr(bench_sparse, "build", build)
    assert smoke("--density", "10,20") == 1
    captured = capsys.readouterr()
    assert "out of luck" in captured.err and "1 failed" in captured.out and "| 20 |" in captured.out


def test_a_noisy_machine_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def compare(variants: dict[str, object], *_: object) -> dict[str, bench.timing.Timing]:
        calls.append(variants)
        return {name: bench.timing.Timing(1.0, 1.0, 1.2, 1.0, 1.5) for name in variants}

    monkeypatch.setattr(bench_sparse, "compare", compare)
    assert bench_sparse.main(["--levels", "tiny", "--channels", "16", "--density", "20"]) == 0
    assert len(calls) == 4
    captured = capsys.readouterr()
    assert "too noisy: dense against itself differs by 20%" in captured.err
    assert "1 not measured" in captured.out


def test_rounds_are_rotated_and_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    slow = {"a": 4.0, "b": 2.0, "c": 8.0}

    def clock(run: Callable[[], str]) -> float:
        order.append(run())
        return slow[order[-1]] * len(order)  # a machine that slows down

    monkeypatch.setattr(bench.timing, "_cpu_clock", clock)
    variants: dict[str, bench.timing.Run] = {name: lambda name=name: name for name in slow}
    timings = bench.timing.compare(variants, torch.device("cpu"), 3)
    assert "".join(order) == "abcbcacab"
    assert timings["a"].ratio == 1
    assert timings["b"].ratio == pytest.approx(2 * 8 / 9)  # of the rounds' 2 * 1/2, 2 * 6/4 and 2 * 8/9
    assert 1 < timings["b"].low < timings["b"].ratio < timings["b"].high < 3


@pytest.mark.parametrize("batch", [1, 2])
def test_the_published_form_is_a_convolution(batch: int) -> None:
    scene = Scene(Case("conv", 20, batch=batch).tiny())
    weight = scene.weight()
    for x, mask in zip(scene.maps, scene.masks, strict=True):
        found = published_conv(x.contiguous(), weight.contiguous(), mask)
        wanted = F.conv2d(x.double(), weight.double(), padding=1) * mask
        assert distance(found, wanted) < 1e-6


def test_fresh_memory_is_poisoned() -> None:
    with poisoned():
        assert torch.empty(4).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_nothing_is_worse_than_nan() -> None:
    assert worst([1.0, 3.0, 2.0]) == 3
    assert all(math.isnan(worst(values)) for values in ([1.0, math.nan], [math.nan, 1.0]))


def test_only_forward_passes_of_single_images_are_graphed() -> None:
    graphed = {
        (case.mode, case.batch)
        for mode in MODES
        for batch in (1, 2)
        for case in [Case(mode, 10, device="cuda", batch=batch)]
        if case.graphed
    }
    assert graphed == {("block", 1), ("head", 1)}
    assert not any(defaults(mode).graphed for mode in MODES)
