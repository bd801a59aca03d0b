"""Files that would run code when they are unpickled, in every place that takes a file: R14."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dyndet
from dyndet.calibrate import calibrate
from dyndet.checkpoints.read import write_calibration
from dyndet.cli.compose import compose_command, compose_experiment
from dyndet.cli.latest import latest_checkpoint
from dyndet.convert.__main__ import convert
from dyndet.convert.release import load_release
from dyndet.errors import UserError
from dyndet.evaluate import evaluate
from dyndet.lightning.lesson_files import LessonFile
from dyndet.lightning.writing import CheckpointFiles
from dyndet.models.backbones.weights import read_weights
from dyndet.predict import predict
from dyndet.report.__main__ import report
from dyndet.sealed import write_sealed
from dyndet.train import train
from faults.files import TINY
from faults.row import Outcome, Row


class Bomb:
    """Calls something when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


def _touch(mark: Path) -> Bomb:
    return Bomb(Path.touch, mark)


def _in_a_checkpoint(bomb: Any) -> dict[str, Any]:
    extra = {"config": {"name": "x"}, "categories": [{"id": 1, "name": "a"}]}
    weights = {"detector.w": torch.ones(3), "detector.b": bomb}
    return {"dyndet": extra, "state_dict": weights, "optimizer_states": [], "global_step": 3}


def _pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _legacy(mark: Path, file: Path) -> None:
    torch.save(_touch(mark), file, _use_new_zipfile_serialization=False)


def _nested(mark: Path, file: Path) -> None:
    """Torch's own reader, told to trust what is inside."""
    inner = io.BytesIO(_pickled(_touch(mark)))
    torch.save(Bomb(_load, inner.getvalue()), file)


def _load(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=False)


PAYLOADS: dict[str, Callable[[Path, Path], object]] = {
    "a shell command": lambda mark, file: torch.save(Bomb(os.system, f"touch '{mark}'"), file),
    "exec": lambda mark, file: torch.save(Bomb(exec, f"open({str(mark)!r}, 'w')"), file),
    "torch's old format": _legacy,
    "a bare pickle": lambda mark, file: file.write_bytes(pickle.dumps({"model": _touch(mark)}, protocol=2)),
    "within a checkpoint": lambda mark, file: torch.save(_in_a_checkpoint(_touch(mark)), file),
    "with a digest that fits": lambda mark, file: write_sealed(_in_a_checkpoint(_touch(mark)), file),
    "a reader within": _nested,
    "an array of objects": lambda mark, file: torch.save({"w": np.array([_touch(mark)], dtype=object)}, file),
}


def _lesson(file: Path, suffix: str) -> None:
    kept = LessonFile(file.parent, 0)
    file.replace(kept.path.with_suffix(suffix))
    if kept.read(3) is None:
        raise UserError("computed again")


def _newest(file: Path) -> None:
    run = file.parent / "outputs" / "x" / "now" / "checkpoints"
    run.mkdir(parents=True)
    for name in ("last", "previous", "best"):
        (run / f"{name}.ckpt").write_bytes(file.read_bytes())
    with contextlib.chdir(file.parent):
        if latest_checkpoint("x")[0] is None:
            raise UserError("none is good")


def _renamed(file: Path, name: str) -> Path:
    return file.replace(file.with_name(name))


def _train(file: Path, *keys: str) -> None:
    train(compose_experiment("shapes_dyn", [*TINY, f"output_dir={file.parent}", "trainer.max_steps=1", *keys]))


def _router(file: Path) -> None:
    train(compose_experiment("shapes_dy_tiny", ["+router=exact", f"init={file}", f"output_dir={file.parent}"]))


def _report(file: Path) -> None:
    (file.parent / "checkpoints").mkdir()
    file.replace(file.parent / "checkpoints" / "last.ckpt")
    report(compose_command("report", [f"runs={file.parent}"]))


_PHOTO = Path(__file__).parents[2] / "docs" / "preview.png"

ENTRIES: dict[str, Callable[[Path], object]] = {
    "load_detector": lambda file: dyndet.load_detector(file),
    "evaluate": lambda file: evaluate(compose_command("evaluate", [f"ckpt={file}", f"output_dir={file.parent}"])),
    "predict": lambda file: predict(
        compose_command("predict", [f"ckpt={file}", f"source={_PHOTO}", f"out={file.parent}"])
    ),
    "calibrate": lambda file: calibrate(compose_command("calibrate", [f"ckpt={file}", f"output_dir={file.parent}"])),
    "write_calibration": lambda file: write_calibration(file, {}),
    "init": lambda file: _train(file, f"init={file}"),
    "ckpt_path": lambda file: _train(file, f"ckpt_path={file}"),
    "ckpt_path=last": _newest,
    "init of step 2": _router,
    "Lightning's reading": lambda file: CheckpointFiles().load_checkpoint(file, weights_only=False),
    "backbone.weights": lambda file: _train(file, f"backbone.weights={file}", "backbone.name=resnet18"),
    "read_weights, .safetensors": lambda file: read_weights(_renamed(file, "x.safetensors")),
    "convert": lambda file: convert(compose_command("convert", [f"source={file}", f"out={file}.out"])),
    "convert, .pkl": lambda file: load_release(_renamed(file, "x.pkl")),
    "convert, .safetensors": lambda file: load_release(_renamed(file, "x.safetensors")),
    "lessons": lambda file: _lesson(file, ".safetensors"),
    "lessons of an earlier dyndet": lambda file: _lesson(file, ".pt"),
    "report": _report,
}


def pickles(folder: Path) -> Iterator[Outcome]:
    for number, (payload, write) in enumerate(PAYLOADS.items()):
        yield _real(folder, payload, write)
        for entry, read in ENTRIES.items():
            place = folder / f"{number}" / entry.replace(" ", "_")
            place.mkdir(parents=True)
            mark, file = place / "mark", place / "x.ckpt"
            write(mark, file)
            said = "nothing was said"
            try:
                with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                    read(file)
            except UserError as error:
                said = str(error)
            refused = said != "nothing was said" and "\n" not in said
            yield Outcome(f"{payload}, {entry}", refused and not mark.exists(), said)


def _real(folder: Path, payload: str, write: Callable[[Path, Path], object]) -> Outcome:
    """A reader without care runs it: it is not harmless for another reason."""
    mark, file = folder / "real", folder / "real.ckpt"
    mark.unlink(missing_ok=True)
    write(mark, file)
    with contextlib.suppress(Exception):
        torch.load(file, weights_only=False)
    if not mark.exists():
        with file.open("rb") as stream, contextlib.suppress(Exception):
            pickle.load(stream)
    return Outcome(f"{payload}, a reader without care", mark.exists(), "it is harmless")


ROWS = [Row("R14", "a pickle that runs code, in every place that takes a file", "refused, not run", pickles, 60)]
