from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from dyndet.data.datamodule import DetectionDataModule
from dyndet.data.mixup import MixUp
from dyndet.data.mosaic import Mosaic
from dyndet.data.shapes import ShapesDataset
from dyndet.data.transforms import RandomHorizontalFlip, Resize
from dyndet.errors import DataError, UserError
from dyndet.lightning.resume import ExactResume
from dyndet.structures import Batch, Category

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")

STEPS_PER_EPOCH, EPOCHS = 4, 3
OFF = ("logger", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
QUIET: dict[str, Any] = {"accelerator": "cpu"} | dict.fromkeys(OFF, False)


def data(**changes: Any) -> DetectionDataModule:
    arguments: dict[str, Any] = {
        "train": partial(ShapesDataset, length=18, size=32),
        "val": partial(ShapesDataset, length=5, size=32, seed=1),
        "num_classes": 3,
        "batch_size": 4,
        "train_transform": [RandomHorizontalFlip()],
    }
    return DetectionDataModule(**(arguments | changes))


def built(**changes: Any) -> DetectionDataModule:
    module = data(**changes)
    module.setup()
    return module


def fingerprint(batch: Batch) -> tuple[tuple[int, ...], str]:
    """Which images, and exactly which pixels."""
    ids = tuple(target.image_id for target in batch.targets)
    return ids, hashlib.sha1(batch.images.pixels.numpy().tobytes()).hexdigest()


class Learner(LightningModule):
    """Fits a number per image; any change of order or augmentation changes its weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(1))
        self.net(torch.zeros(1, 3, 32, 32))
        self.seen: list[tuple[tuple[int, ...], str]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen.append(fingerprint(batch))
        x = batch.images.pixels.float() / 255
        count = torch.tensor([[float(len(target.boxes))] for target in batch.targets])
        return (self.net(x) - count).square().mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def weights(self) -> str:
        return hashlib.sha1(b"".join(p.detach().numpy().tobytes() for p in self.parameters())).hexdigest()


class PowerCutError(Exception): ...


class Interrupt(Callback):
    """Writes a checkpoint in a hook after so many steps, then stops the process as a crash would."""

    def __init__(self, path: Any, step: int, hook: str) -> None:
        def cut(trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == step:
                trainer.save_checkpoint(path)
                raise PowerCutError

        setattr(self, hook, cut)


def fit(module: DetectionDataModule, *callbacks: Callback, ckpt: Any = None, **trainer: Any) -> Learner:
    learner = Learner()
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = QUIET | {"max_epochs": EPOCHS, "num_sanity_val_steps": 0, "enable_checkpointing": saves} | trainer
    Trainer(callbacks=list(callbacks), **options).fit(learner, module, ckpt_path=ckpt, weights_only=ckpt and True)
    return learner


@pytest.fixture(scope="module")
def uninterrupted() -> Learner:
    learner = fit(data())
    assert len(learner.seen) == STEPS_PER_EPOCH * EPOCHS == len(set(learner.seen))
    return learner


def check_resume(
    whole: Learner, path: Any, step: int, hook: str, *, num_workers: int = 0, train_mix: Any = None, **trainer: Any
) -> None:
    def module() -> DetectionDataModule:
        return data(num_workers=num_workers, train_mix=train_mix)

    with pytest.raises(PowerCutError):
        fit(module(), Interrupt(path, step, hook), **trainer)
    torch.rand(7)  # the new process has another global random state
    resumed = fit(module(), ckpt=path, **trainer)
    assert resumed.seen == whole.seen[step:]
    assert resumed.weights() == whole.weights()


@pytest.mark.parametrize("step", [1, 3, 4, 5, 7, 8, 9, 11])
def test_resume_is_bit_exact(uninterrupted, tmp_path, step):
    check_resume(uninterrupted, tmp_path / "cut.ckpt", step, "on_train_batch_end")


@pytest.mark.parametrize(
    ("hook", "step", "options"),
    [
        ("on_validation_end", 4, {}),
        ("on_validation_end", 8, {}),
        ("on_validation_end", 6, {"val_check_interval": 2}),
        ("on_train_epoch_end", 4, {}),
        ("on_train_batch_end", 6, {"max_epochs": -1, "max_steps": 12}),
        ("on_train_batch_end", 8, {"max_epochs": -1, "max_steps": 12}),
    ],
)
def test_resume_from_any_hook(uninterrupted, tmp_path, hook, step, options):
    check_resume(uninterrupted, tmp_path / "cut.ckpt", step, hook, **options)


@pytest.mark.parametrize("step", [3, 8])
def test_resume_with_mosaics(uninterrupted, tmp_path, step):
    mix = MixUp(Mosaic(32), p=0.5)
    whole = fit(data(train_mix=mix))
    assert [ids for ids, _ in whole.seen] == [ids for ids, _ in uninterrupted.seen]
    assert not {pixels for _, pixels in whole.seen} & {pixels for _, pixels in uninterrupted.seen}
    check_resume(whole, tmp_path / "cut.ckpt", step, "on_train_batch_end", train_mix=mix)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 8])
def test_workers_change_nothing(uninterrupted, tmp_path, step):
    assert fit(data(num_workers=2)).seen == uninterrupted.seen
    check_resume(uninterrupted, tmp_path / "cut.ckpt", step, "on_train_batch_end", num_workers=2)


@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 6), (4, 5), (4, 8), (4, 10), (8, 11)])
def test_resume_of_a_resumed_run(uninterrupted, tmp_path, first, second):
    paths = tmp_path / "1.ckpt", tmp_path / "2.ckpt"
    for step, path, ckpt in ((first, paths[0], None), (second, paths[1], paths[0])):
        with pytest.raises(PowerCutError):
            fit(data(), ExactResume(), Interrupt(path, step, "on_train_batch_end"), ckpt=ckpt)
    resumed = fit(data(), ExactResume(), ckpt=paths[1])
    assert resumed.seen == uninterrupted.seen[second:]
    assert resumed.weights() == uninterrupted.weights()


def test_a_finished_run_goes_on_with_the_next_epoch(uninterrupted, tmp_path):
    fit(data(), ModelCheckpoint(tmp_path, "last"), max_epochs=2)
    resumed = fit(data(), ckpt=tmp_path / "last.ckpt")
    assert resumed.seen == uninterrupted.seen[2 * STEPS_PER_EPOCH :]
    assert resumed.weights() == uninterrupted.weights()


@pytest.mark.parametrize("step", [3, 5])
def test_short_epochs_resume(tmp_path, step):
    whole = fit(data(), limit_train_batches=3)
    check_resume(whole, tmp_path / "cut.ckpt", step, "on_train_batch_end", limit_train_batches=3)


def test_a_changed_recipe_is_reported(tmp_path):
    with pytest.raises(PowerCutError):
        fit(data(), Interrupt(tmp_path / "cut.ckpt", 2, "on_train_batch_end"))
    with pytest.warns(UserWarning, match="batch_size was 4 and is 3"):
        fit(data(batch_size=3), ckpt=tmp_path / "cut.ckpt")


def test_evaluating_a_checkpoint_does_not_start_training_in_its_middle(uninterrupted, tmp_path):
    with pytest.raises(PowerCutError):
        fit(data(), Interrupt(tmp_path / "cut.ckpt", 2, "on_train_batch_end"))
    module = data()
    Trainer(**QUIET).validate(Learner(), module, ckpt_path=tmp_path / "cut.ckpt", weights_only=True)
    assert fit(module).seen == uninterrupted.seen


def test_epochs_and_seeds_differ(uninterrupted):
    seen = uninterrupted.seen
    epochs = [sorted(i for ids, _ in seen[k : k + STEPS_PER_EPOCH] for i in ids) for k in (0, STEPS_PER_EPOCH)]
    assert all(len(set(epoch)) == 16 for epoch in epochs)
    assert seen[:STEPS_PER_EPOCH] != fit(data(seed=1), max_epochs=1).seen


def test_overfitting_repeats_the_same_batches():
    seen = fit(data(), overfit_batches=2).seen
    assert [ids for ids, _ in seen] == [(0, 1, 2, 3), (4, 5, 6, 7)] * EPOCHS
    assert len(set(seen)) == 2


def test_prediction_sees_every_validation_image_once():
    class Predictor(Learner):
        def predict_step(self, batch: Batch, batch_idx: int) -> list[int]:
            return [target.image_id for target in batch.targets]

    assert Trainer(**QUIET).predict(Predictor(), data(val_batch_size=2)) == [[0, 1], [2, 3], [4]]


def test_ranks_share_the_work(monkeypatch):
    module = built(val_batch_size=1)
    train, val = [], []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        train.append([target.image_id for batch in module.train_dataloader() for target in batch.targets])
        val.append([target.image_id for batch in module.val_dataloader() for target in batch.targets])
    assert val == [[0, 2, 4], [1, 3]]
    assert [len(ids) for ids in train] == [8, 8]
    assert len({*train[0], *train[1]}) == 16


def test_only_the_needed_split_is_built():
    def refuse() -> ShapesDataset:
        raise AssertionError("not needed")

    module = data(train=refuse)
    module.setup("validate")
    assert [len(batch.targets) for batch in module.val_dataloader()] == [4, 1]
    assert module.categories == [Category(1, "circle"), Category(2, "square"), Category(3, "triangle")]
    with pytest.raises(RuntimeError, match="train split is not built"):
        _ = module.train


def test_built_datasets_are_accepted_and_batches_padded():
    module = built(train=ShapesDataset(length=8, size=(40, 70)), val_transform=Resize((50, 33)))
    (batch, _) = module.train_dataloader()
    assert batch.images.pixels.shape == (4, 3, 64, 96)
    assert next(iter(module.val_dataloader())).images.sizes.tolist() == [[50, 33]] * 4


def test_limits_spread_over_the_set():
    module = built(max_train=4, max_val=100)
    assert [module.train[i].target.image_id for i in range(4)] == [0, 4, 9, 13]
    assert len(module.train.sizes) == len(module.train) == 4
    assert len(module.val) == 5


def test_batches_hold_one_aspect():
    class Mixed(ShapesDataset):
        """Every third image is upright."""

        def __init__(self) -> None:
            super().__init__(length=24, size=(32, 64))
            self.sizes = [(64, 32) if i % 3 == 0 else (32, 64) for i in range(24)]

        def __getitem__(self, index: int) -> Any:
            sample = super().__getitem__(index)
            if index % 3 == 0:
                sample.image = sample.image.transpose(1, 2)
            return sample

    def padded_sizes(**changes: Any) -> set[tuple[int, ...]]:
        module = built(train=Mixed(), train_transform=None, **changes)
        batches = list(module.train_dataloader())
        assert sorted(target.image_id for batch in batches for target in batch.targets) == list(range(24))
        return {tuple(batch.images.pixels.shape[-2:]) for batch in batches}

    assert padded_sizes(group_by_aspect=True) == {(32, 64), (64, 32)}
    assert (64, 64) in padded_sizes()


def test_categories_must_fit():
    with pytest.raises(UserError, match=r"the data has 3 categories but num_classes is 80: set data.num_classes=3"):
        built(num_classes=80)
    other = ShapesDataset(length=3, size=32)
    other.categories = [Category(7, "circle"), *other.categories[1:]]
    with pytest.raises(UserError, match=r"train and val splits must list the same categories.*1 circle.*7 circle"):
        built(val=other)


def test_empty_splits_and_too_large_batches_are_errors():
    with pytest.raises(DataError, match="the val split has no images"):
        built(val=ShapesDataset(length=0))
    with pytest.raises(UserError, match=r"18 images.*one batch of 32.*drop_last=false"):
        built(batch_size=32).train_dataloader()
    assert len(built(batch_size=32, drop_last=False).train_dataloader()) == 1


def test_batches_move_between_devices():
    module = built()
    (batch, _) = module.val_dataloader()
    moved = module.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved.images.pixels.device.type == moved.targets[0].boxes.device.type == "meta"


def test_the_number_of_classes_comes_from_the_data_unless_it_is_given():
    module = data(num_classes=None)
    with pytest.raises(RuntimeError, match="setup"):
        _ = module.num_classes
    module.setup()
    assert module.num_classes == len(module.categories) == 3
    assert data().num_classes == 3


def test_splits_with_other_categories_are_refused_by_name():
    other = ShapesDataset(length=5, size=32, seed=1, num_classes=2)
    with pytest.raises(UserError, match=r"there is \[3 triangle\] only in train: correct"):
        built(val=other, num_classes=None)
    other = ShapesDataset(length=5, size=32, seed=1, num_classes=3)
    other.categories = other.categories[::-1]
    with pytest.raises(UserError, match=r"another order: \[1 circle, 2 square, 3 triangle\] and \[3 triangle, 2 sq"):
        built(val=other, num_classes=None)
