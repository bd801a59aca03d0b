"""Values that are no numbers, and memory that runs out: guarded before the update, and told in one line."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults import edges, memory, nonfinite, runs
from torch.utils._python_dispatch import TorchDispatchMode

from dyndet.cli.out_of_memory import Work, explained, ran_out
from dyndet.errors import DivergedError, MemoryShortageError, UserError
from dyndet.lightning.divergence import _OVERFLOWS, DivergenceWatch, _Asked
from dyndet.lightning.dump import Seen, read_dump
from dyndet.lightning.nonfinite import any_lost
from dyndet.structures import Batch, ImageBatch, Target


@pytest.mark.parametrize(("kind", "policy"), [("input", "stop"), ("gradient", "skip")])
def test_no_update_is_made_of_what_is_no_number(kind: str, policy: str, tmp_path: Path) -> None:
    family = "fine-grained, accumulated" if kind == "gradient" else "fine-grained"
    outcome = nonfinite._outcome("", family, tmp_path, tmp_path / "run", kind, 2, float("nan"), "32-true", policy)
    assert outcome.survived, outcome.said


def test_the_row_sees_an_unguarded_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DivergenceWatch, "on_before_optimizer_step", lambda *_: None)
    outcome = nonfinite._outcome(
        "", "fine-grained", tmp_path, tmp_path / "run", "gradient", 2, float("nan"), "32-true", "skip"
    )
    assert not outcome.survived and "state changed" in outcome.said


def test_statistics_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    poison = f"+callbacks.poison={{_target_: {nonfinite.__name__}.Poison, kind: statistics, step: 1, value: inf}}"
    with pytest.raises(DivergedError, match=r"keeps are no numbers at step 4: detector\.backbone\.\S+running_var"):
        runs.run("fine-grained", tmp_path, poison)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_limit_ends_skipping(tmp_path: Path) -> None:
    poison = f"+callbacks.poison={{_target_: {nonfinite.__name__}.Poison, kind: weight, step: 1, value: nan}}"
    with pytest.raises(DivergedError, match=r"at step 2, .* \(number 2 of this run; max_skipped=1\)"):
        runs.run("fine-grained", tmp_path, poison, "on_nonfinite=skip", "max_skipped=1")
    assert len(list(tmp_path.glob("dump_step_*.pt"))) == 2


class Waits(TorchDispatchMode):
    """Counts how often the host asks for a value of a tensor."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_a_fused_optimizer_leaves_out_the_update_without_a_wait(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the answer arrives three steps late. Skipped, the run ends as one that has looked at once."""
    poison = f"+callbacks.poison={{_target_: {nonfinite.__name__}.Poison, kind: gradient, step: 2, value: nan}}"
    keys = [poison, f"on_nonfinite={policy}", "trainer.log_every_n_steps=3", "trainer.max_epochs=2"]
    if policy == "skip":
        runs.run("fine-grained, averaged", tmp_path / "at once", *keys)
    waits, guarded = [], DivergenceWatch.on_before_optimizer_step

    def counted(self: DivergenceWatch, *args: Any) -> None:
        with Waits() as counter:
            guarded(self, *args)
        waits.append(counter.count)

    monkeypatch.setattr(DivergenceWatch, "on_before_optimizer_step", counted)
    monkeypatch.setattr(DivergenceWatch, "_decided_there", lambda *_: True)
    monkeypatch.setattr(_Asked, "is_there", lambda *_: False)
    if policy == "skip":
        runs.run("fine-grained, averaged", tmp_path / "late", *keys)
        assert runs.differences(tmp_path / "at once", tmp_path / "late") == []
        assert len(waits) == 8
    else:
        with pytest.raises(DivergedError, match=r"a gradient is no number at step 2, .*: images \d+, \d+"):
            runs.run("fine-grained, averaged", tmp_path / "late", *keys)
        assert nonfinite.Poison.latest.before == nonfinite.Poison.latest.after
    assert waits[1:] == [0] * len(waits[1:])  # at first there are no moments that could be left alone


def stepping(watch: DivergenceWatch, *parameters: torch.nn.Parameter, scaler: object = None) -> tuple[Any, Any]:
    """A module with running statistics, and a step of fused AdamW whose gradients, and statistics, are some value."""
    module: Any = torch.nn.BatchNorm1d(2)
    module.device = torch.device("cpu")
    trainer: Any = SimpleNamespace(
        precision_plugin=SimpleNamespace(scaler=scaler), world_size=1, global_step=7, accumulate_grad_batches=1,
        callback_metrics={}, is_global_zero=True, callbacks=[],
    )  # fmt: skip
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)

    def step(*values: float) -> None:
        watch.on_train_batch_start(trainer, module, (torch.ones(1), torch.ones(1)), 0)
        watch.on_before_backward(trainer, module, torch.tensor(1.0))
        module.running_mean.fill_(values[0])
        for parameter, value in zip(parameters, values, strict=False):
            parameter.grad = torch.tensor([1.0, value])
        watch.on_before_optimizer_step(trainer, module, optimizer)
        optimizer.step()

    return module, step


def test_overflows_of_a_scaler_count_when_they_do_not_end() -> None:
    watch, parameter = DivergenceWatch(), torch.nn.Parameter(torch.ones(2))
    module, step = stepping(watch, parameter, scaler=object())
    for _ in range(3):
        for _ in range(_OVERFLOWS - 1):
            step(float("inf"))
            assert parameter.grad is None and module.running_mean.isfinite().all()
        step(1.0)
        assert parameter.grad is not None and module.running_mean.tolist() == [1, 1]
    assert watch.skipped == 0
    with pytest.raises(DivergedError, match=f"{_OVERFLOWS} steps in a row"):
        for _ in range(_OVERFLOWS):
            step(float("inf"))


def test_a_step_that_was_left_out_says_nothing_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that gets its first gradient has no moments, so that this step is looked at on the host."""
    monkeypatch.setattr(DivergenceWatch, "_decided_there", lambda *_: True)
    watch = DivergenceWatch(policy="skip")
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    module, step = stepping(watch, first, second)
    step(1.0)
    before = first.tolist()
    with pytest.warns(UserWarning, match="a gradient is no number at step 7"):
        step(float("nan"))
        assert first.tolist() == before and module.running_mean.tolist() == [1, 1]
        step(2.0, 2.0)
    assert watch.skipped == 1 and first.tolist() != before and second.tolist() != [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_value_is_found(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        tensors = [torch.randn(5, 3, generator=generator).to(dtype), torch.full((2,), 3e38).to(dtype), torch.zeros(0)]
        assert not any_lost(tensors, torch.device("cpu"))
        place = int(torch.randint(15, (), generator=generator))
        for value in ("nan", "inf", "-inf"):
            tensors[0].view(-1)[place] = float(value)
            assert any_lost(tensors, torch.device("cpu"))
    assert not any_lost([], torch.device("cpu"))


def test_images_are_named_by_id_and_file() -> None:
    def target(number: int, path: str) -> Target:
        return Target(torch.ones(1, 4), torch.zeros(1).long(), torch.zeros(1).bool(), image_id=number, path=path)

    images = ImageBatch.of(torch.zeros(2, 3, 4, 4))
    seen = Seen(Batch(images, [target(7, "a.jpg"), target(9, "")]), {})
    seen.loss = torch.tensor(float("nan"))
    asked: Any = _Asked(
        3, [seen], None, torch.tensor(True), {"cls": torch.tensor(1.0), "box": torch.tensor(float("inf"))}
    )  # type: ignore[arg-type]
    assert asked.fault() == "the loss is no number (box)" and asked.images() == "images 7 a.jpg, 9"


def test_what_is_no_dump_says_so(tmp_path: Path) -> None:
    content = {"dyndet": {"config": {}, "categories": []}, "state_dict": {}}
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match="is a checkpoint, but no step that went wrong"):
        read_dump(tmp_path / "a.pt")
    torch.save(
        {**content, "batches": [{"images": 1}], "precision": "32-true", "fault": "", "step": 1}, tmp_path / "b.pt"
    )
    with pytest.raises(UserError, match="is a damaged dump"):
        read_dump(tmp_path / "b.pt")
    evil = {**content, "dyndet": {"config": {"detector": {"_target_": "os.system"}}, "categories": []}}
    torch.save(evil, tmp_path / "c.pt")
    with pytest.raises(UserError, match="is not to be trusted blindly"):
        read_dump(tmp_path / "c.pt")


def test_out_of_memory_costs_a_line_and_no_step(tmp_path: Path) -> None:
    text = memory._run("fine-grained", tmp_path, tmp_path / "run", "on_before_backward", 3, memory.ERRORS[1])
    assert "out of memory in training, step 2, at a batch of 4 images of 64 x 64 (H x W)" in text
    assert "data.batch_size=2 trainer.accumulate_grad_batches=2" in text and "ckpt_path=last goes on" in text
    assert runs.content(tmp_path / "run")["global_step"] == 2


def test_half_a_batch_goes_on(tmp_path: Path) -> None:
    outcome = next(memory.halved(tmp_path))
    assert outcome.survived, outcome.said


def test_memory_that_is_short_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 58)
    assert ran_out(caught.value) and ran_out(MemoryError()) and ran_out(torch.OutOfMemoryError("CUDA out of memory"))
    assert not ran_out(RuntimeError("shape mismatch")) and not ran_out(ValueError("out of memory"))
    work = Work("training")
    list(work.of([ImageBatch.of([torch.zeros(3, 40, 30), torch.zeros(3, 20, 50)], 32)]))
    with (
        pytest.raises(
            MemoryShortageError,
            match=r"at a batch of 2 images of 40 x 30, 20 x 50 \(H x W\), padded to 64 x 64 .*: buy more",
        ),
        explained(work, lambda: "buy more"),
    ):
        torch.empty(1 << 58)


@pytest.mark.parametrize("row", [edges.trained, edges.levels, edges.sizes])
def test_edges_of_the_numbers(row: Any, tmp_path: Path) -> None:
    lost = [outcome for outcome in islice(row(tmp_path), 4) if not outcome.survived]
    assert not lost
