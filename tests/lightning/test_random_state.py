"""Random state of several processes over a resume."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment

from dyndet.lightning.resume import ExactResume

STEPS, CUT = 8, 3  # two epochs of four; the checkpoint is written within the first


class Drawing(LightningModule):
    """Keeps what each step draws."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.draws: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.draws.append(torch.rand(()).item())
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Save(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == CUT:
            trainer.save_checkpoint(self.path)


def fit(*callbacks: Callback, ckpt: Path | None = None, processes: int = 1) -> list[float]:
    module = Drawing()
    trainer = Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", max_steps=STEPS,
        callbacks=[ExactResume(), *callbacks], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, plugins=[LightningEnvironment()] if processes > 1 else None,
    )  # fmt: skip
    data = torch.utils.data.DataLoader(torch.ones(4 * processes, 1))  # type: ignore[arg-type]
    trainer.fit(module, data, ckpt_path=ckpt)
    return module.draws


def _process(rank: int, folder: Path, results: Any) -> None:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", str(rank))  # so that Lightning starts no more of them
        patch.delenv("PL_GLOBAL_SEED", raising=False)  # left by another test, it would seed both alike
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        torch.manual_seed(rank)
        whole = fit(Save(folder / "two.ckpt"), processes=2)
        torch.manual_seed(7)
        results[rank] = whole, fit(ckpt=folder / "two.ckpt", processes=2)
        if rank == 0:  # alone in an interrupt: no process waits for another
            checkpoint: dict[str, Any] = {"callbacks": {"ExactResume": {"cpu": torch.get_rng_state()}}}
            loops = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu").fit_loop
            trainer: Any = SimpleNamespace(
                world_size=2,
                interrupted=True,
                accumulate_grad_batches=1,
                fit_loop=loops,
                state=SimpleNamespace(fn="fit"),
            )
            ExactResume().on_save_checkpoint(trainer, Drawing(), checkpoint)
            assert set(checkpoint["callbacks"]["ExactResume"]) == {"cpu"}
        dist.destroy_process_group()


def test_every_process_gets_its_own_state_back(tmp_path: Path) -> None:
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(_process, (tmp_path, results), nprocs=2, start_method="fork")  # type: ignore[attr-defined]
        draws = dict(results)
    for whole, resumed in draws.values():
        assert len(whole) == STEPS and resumed == whole[CUT:]
    assert set(draws[0][1]).isdisjoint(draws[1][1])
    # A checkpoint of two processes, resumed by one, which is the first of them.
    assert fit(ckpt=tmp_path / "two.ckpt")[0] == draws[0][0][CUT]


def drawn(state: dict[str, Any], rank: int) -> float:
    """By a process of this rank, at its first step after a resume."""
    callback = ExactResume()
    callback.load_state_dict(state)
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    stand_in: Any = SimpleNamespace(fit_loop=trainer.fit_loop, global_rank=rank)
    torch.seed()
    callback.on_train_batch_start(stand_in, Drawing(), None, 0)
    return torch.rand(()).item()


@pytest.mark.parametrize("kept", [1, 2, None])
def test_processes_without_a_state_are_seeded_from_the_first(kept: int | None) -> None:
    """`None`: the form of checkpoints that kept one process's state."""
    states = [{"cpu": torch.Generator().manual_seed(rank).get_state()} for rank in range(kept or 1)]
    state = {"processes": states} if kept else states[0]
    draws = [drawn(state, rank) for rank in range(4)]
    assert draws == [drawn(state, rank) for rank in range(4)]
    assert len(set(draws)) == 4
    for rank, saved in enumerate(states):
        assert draws[rank] == torch.rand((), generator=torch.Generator().set_state(saved["cpu"])).item()
