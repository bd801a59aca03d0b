"""Checkpoints are never torn, never damaged unnoticed, never lost: a few cases of each row, and how files look."""

from __future__ import annotations

import hashlib
import os
import time
import zipfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults import files, full_disk, pickles
from faults.row import Outcome
from lightning.pytorch.plugins import AsyncCheckpointIO, MixedPrecision
from omegaconf import OmegaConf

from dyndet.checkpoints.read import resume_path
from dyndet.cli.command import _one_line
from dyndet.cli.compose import compose_experiment
from dyndet.disk import part_of, sweep, write_whole
from dyndet.errors import UserError, WriteError
from dyndet.lightning.lesson_files import about_kept
from dyndet.lightning.writing import CheckpointFiles, WritePolicy, keep_logging, with_checkpoint_files
from dyndet.sealed import MARK, fault, read_sealed, write_sealed
from tiny_runs import content, run


@pytest.mark.parametrize(
    ("inject", "cases"),
    [
        (files.moments, 8), (files.fallbacks, 30), (files.earlier, 30), (files.lessons, 40),
        (full_disk.faults_of_calls, 55), (full_disk.permission, 6),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*(is damaged, so that|The run goes on)")
def test_rows(tmp_path: Path, inject: Callable[[Path], Iterator[Outcome]], cases: int) -> None:
    outcomes = list(islice(inject(tmp_path), cases))
    assert len(outcomes) == cases and not [outcome for outcome in outcomes if not outcome.survived]


@pytest.mark.parametrize("entry", pickles.ENTRIES)
def test_pickles_are_not_run(tmp_path: Path, entry: str) -> None:
    payload = list(pickles.PAYLOADS)[len(entry) % len(pickles.PAYLOADS)]
    mark, file = tmp_path / "mark", tmp_path / "x.ckpt"
    pickles.PAYLOADS[payload](mark, file)
    with pytest.raises(UserError) as error:
        pickles.ENTRIES[entry](file)
    assert "\n" not in str(error.value) and not mark.exists()


def test_every_program_reads_a_sealed_file_and_every_byte_counts(tmp_path: Path) -> None:
    file, held = tmp_path / "a.ckpt", {"w": torch.arange(6.0), "n": [1, "x", None], "step": 3}
    write_sealed(held, file)
    data = file.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
    assert data[-78:-64] == MARK and data[-64:].decode() == hashlib.sha256(data[:-64]).hexdigest()
    with zipfile.ZipFile(file) as archive:
        assert archive.comment == data[-78:] and archive.testzip() is None
    for mmap in (False, True):
        assert repr(torch.load(file, weights_only=True, mmap=mmap)) == repr(held) == repr(read_sealed(file, mmap=mmap))
    damaged = tmp_path / "b.ckpt"
    for place in range(len(data)):
        damaged.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        assert fault(damaged), place
    for cut in range(1, len(data), 7):
        damaged.write_bytes(data[:-cut])
        assert fault(damaged), cut
    damaged.write_bytes(data + b"\0")
    assert fault(damaged) and fault(file) is None


def test_what_is_known_of_a_file_is_looked_up_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    write_sealed({"a": 1}, file)
    for _ in range(20):  # within one tick of the file system's clock
        data = bytearray(file.read_bytes())
        assert fault(file) is None
        data[60] ^= 1
        file.write_bytes(data)
        assert fault(file) is not None
        data[60] ^= 1
        file.write_bytes(data)


def test_an_archive_that_unpacks_to_more_than_itself_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 24))
    assert "larger than itself" in str(fault(tmp_path / "a.ckpt"))


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_cannot_take_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    last, previous, replace = tmp_path / "last.ckpt", tmp_path / "previous.ckpt", os.replace
    write_sealed({"a": 1}, last)

    def failing(source: Path, target: Path) -> None:
        if Path(target) == last and ".part" in str(source):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr("os.replace", failing)
    if not links:
        monkeypatch.setattr("os.link", lambda *args, **kwargs: failing(Path("x.part"), last))
    with pytest.raises(WriteError, match=r"Input/output error.*last\.ckpt is as it was before"):
        write_sealed({"a": 2}, last, previous=previous)
    assert read_sealed(last) == {"a": 1} and not list(tmp_path.glob("*.part"))


def test_an_interrupt_amid_a_write_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch would make an error of its own of it."""
    file = tmp_path / "a.ckpt"
    write_sealed({"a": 1}, file)

    def interrupted(self: Any, data: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dyndet.sealed._Sealing.write", interrupted)
        try:
            raise KeyError("power cut")
        except KeyError:
            write_sealed({"a": torch.ones(1000)}, file)
    assert read_sealed(file) == {"a": 1} and [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_parts_of_dead_processes_are_swept(tmp_path: Path) -> None:
    mine = part_of(tmp_path / "last.ckpt")
    host = mine.name.split(".")[-2].rpartition("-")[0]
    gone = tmp_path / f"best.ckpt.{host}-4194305.part"  # more than any process is numbered
    elsewhere = tmp_path / "last.ckpt.other-7.part"
    old = tmp_path / "last.ckpt.third-7.part"
    others = tmp_path / "notes.part"
    for file in (mine, gone, elsewhere, old, others):
        file.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    sweep(tmp_path)
    assert set(tmp_path.iterdir()) == {mine, elsewhere, others}


def test_a_damaged_file_names_a_good_one_beside_it(tmp_path: Path) -> None:
    run(tmp_path, "trainer.max_epochs=2")
    folder = tmp_path / "checkpoints"
    steps = {name: content(tmp_path, name)["global_step"] for name in ("last", "previous")}
    assert steps == {"last": 12, "previous": 6}
    last = folder / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"last\.ckpt cannot be read .* damaged.* beside it is good: give ckpt_path="):
        resume_path(compose_experiment("shapes_dyn", [f"ckpt_path={last}"]))
    (folder / "previous.ckpt").unlink()
    (folder / "best.ckpt").unlink()
    with pytest.raises(UserError, match="Copy it again"):
        resume_path(compose_experiment("shapes_dyn", [f"ckpt_path={last}"]))


def test_the_last_that_is_whole_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs/x/now/checkpoints")
    for step in (1, 2):
        CheckpointFiles().save_checkpoint({"global_step": step, **pickles._in_a_checkpoint(0)}, folder / "last.ckpt")
    config = compose_experiment("shapes_dyn", ["name=x", "ckpt_path=last"])
    said: list[str] = []
    assert resume_path(config, said.append) == str(folder / "last.ckpt") and not said
    (folder / "last.ckpt").write_bytes(b"PK\3\4")
    assert resume_path(config, said.append) == str(folder / "previous.ckpt")
    assert "last.ckpt: it is damaged" in said[0] and "\n" not in said[0]
    (folder / "previous.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match=r"no run of 'x' has a good one \(.*last\.ckpt.*previous\.ckpt"):
        resume_path(config)


@pytest.mark.parametrize("policy", ["stop", "go_on"])
@pytest.mark.filterwarnings("ignore:.*The run goes on")
def test_a_best_that_was_not_written_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    scores, saves = [0.1, 0.3, 0.2], 0
    monkeypatch.setattr("dyndet.metrics.average_precision.CocoMetric.compute", lambda self: {"AP": scores.pop(0)})

    def failing(held: Any, path: Path, **kwargs: Any) -> None:
        nonlocal saves
        saves += path.name == "best.ckpt"
        if path.name == "best.ckpt" and saves == 2:
            raise WriteError(f"{path} cannot be written: no room")
        write_sealed(held, path, **kwargs)

    monkeypatch.setattr("dyndet.lightning.writing.write_sealed", failing)
    keys = ["trainer.max_epochs=3", f"on_write_error={policy}"]
    if policy == "stop":
        with pytest.raises(WriteError, match=r"best\.ckpt cannot be written: no room\. Then go on with ckpt_path=last"):
            run(tmp_path, *keys)
        assert content(tmp_path)["global_step"] == 6
    else:
        run(tmp_path, *keys)
        assert content(tmp_path, "best")["global_step"] == content(tmp_path)["global_step"] == 18


def test_users_plugins_and_policies(tmp_path: Path) -> None:
    def chosen(**trainer: Any) -> list[Any]:
        return with_checkpoint_files(OmegaConf.create(trainer), WritePolicy())

    own = {"_target_": "lightning.pytorch.plugins.AsyncCheckpointIO"}
    precision = {"_target_": "lightning.pytorch.plugins.MixedPrecision", "precision": "bf16-mixed", "device": "cpu"}
    assert [type(item) for item in chosen()] == [CheckpointFiles]
    assert [type(item) for item in chosen(plugins=precision)] == [MixedPrecision, CheckpointFiles]
    assert [type(item) for item in chosen(plugins=[own])] == [AsyncCheckpointIO]
    assert chosen(strategy={"_target_": "x", "checkpoint_io": own}) == []
    with pytest.raises(UserError, match="on_write_error=never: stop or go_on"):
        WritePolicy("never")


@pytest.mark.filterwarnings("ignore:.*The run goes on")
def test_loggers_follow_the_policy() -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    def logger() -> Any:
        return SimpleNamespace(save_dir="runs", name="csv", **dict.fromkeys(methods, full))

    methods = ("log_hyperparams", "log_metrics", "save", "after_save_checkpoint", "finalize")
    stops, goes_on = logger(), logger()
    keep_logging(stops, WritePolicy())
    keep_logging(goes_on, WritePolicy("go_on"))
    with pytest.raises(WriteError, match=r"runs cannot be written: No space left on device \(.* are free\)"):
        stops.log_metrics({})
    goes_on.finalize("failed")


def test_a_full_disk_is_one_line_of_any_command(tmp_path: Path) -> None:
    line = _one_line(OSError(28, "No space left on device"), "predict")
    assert line == "a file of this command cannot be written: No space left on device: free some space where it goes"
    assert _one_line(OSError(2, "No such file"), "predict") is None
    write_whole(tmp_path / "a.json", "old")
    with full_disk.failing("replace", 28), pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "a.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text() == "old"


def test_lessons_of_an_earlier_dyndet_are_named(tmp_path: Path) -> None:
    assert about_kept(tmp_path) == "new"
    (tmp_path / "00000.pt").touch()
    assert ".pt files there are of an earlier dyndet" in about_kept(tmp_path)
    (tmp_path / "00000.safetensors").touch()
    assert about_kept(tmp_path) == "kept from an earlier pass"
