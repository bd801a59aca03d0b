"""One door to the commands: found from anywhere, quick, and helpful."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

import dyndet
from commands import forked
from dyndet.cli import door
from dyndet.cli.usage import COMMANDS, command_help, overview


def opened(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[str, str]:
    monkeypatch.setattr(sys, "argv", ["dyndet", *arguments])
    door.main()
    printed = capsys.readouterr()
    return printed.out, printed.err


def test_the_console_script_is_the_door() -> None:
    scripts = [item for found in distributions(name="dyndet") for item in found.entry_points if item.name == "dyndet"]
    assert scripts and all(script.load() is door.main for script in scripts)


def test_help_needs_nothing_heavy(tmp_path: Path) -> None:
    """Neither torch nor Hydra nor numpy: what it takes is Python's own start, and some milliseconds."""
    line = (
        "import sys; sys.argv = ['dyndet', 'train', '--help']; from dyndet.cli.door import main; main();"
        "print([name for name in ('torch', 'hydra', 'omegaconf', 'numpy', 'lightning', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "usage: dyndet train" in done.stdout


def test_all_commands_in_one_screen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        out, _ = opened(capsys, monkeypatch, *arguments)
        assert len(out.splitlines()) <= 24 and all(len(line) <= 100 for line in out.splitlines())
        listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and "dyndet" not in line[:9]]
        assert {"train", "evaluate", "predict", "calibrate", "report", "convert"} <= set(listed) <= set(COMMANDS)
    assert opened(capsys, monkeypatch, "--version") == (f"dyndet {dyndet.__version__}\n", "")


def test_only_commands_that_are_there_are_listed() -> None:
    assert "doctor" not in overview(["train", "report"]).split("Examples")[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["trian"], "Did you mean 'train'?"), (["xyz"], "Commands: train, "), (["name=x"], "the command comes first")],
)
def test_an_unknown_command_costs_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as left:
        opened(capsys, monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and words in error


def test_every_command_says_what_it_takes() -> None:
    for command in ("evaluate", "predict", "calibrate", "report", "convert"):
        text = command_help(command, ["--help"]) or ""
        assert f"usage: dyndet {command}" in text and "must be given" in text and f"dyndet {command} " in text
        assert "hydra:" not in text and "_target_" not in text
    assert "fuse=true  " in (command_help("predict", ["-h"]) or "")
    assert command_help("train", ["seed=1"]) is None


def test_the_choices_are_real_ones(tmp_path: Path) -> None:
    (tmp_path / "neck").mkdir()
    (tmp_path / "neck" / "wide.yaml").write_text("defaults: [fpn]\nchannels: 96\n")
    text = command_help("train", ["--help", "groups", f"--config-dir={tmp_path}"]) or ""
    groups = dict(line.split(": ") for line in text.splitlines() if ": " in line)
    assert {"wide", "fpn_small", "yolov7x"} <= set(groups["neck"].split(", "))
    assert "fcos_d8_dyn" in groups["+experiment"] and "files" not in groups["data"].split(", ")
    assert not groups.keys() & {"convert", "size", "predictor/roi", "predictor/rpn"}


@pytest.mark.parametrize("beside", ["dyndet", "."])
def test_import_beside_a_folder_of_the_same_name(beside: str, tmp_path: Path) -> None:
    """As a script or a notebook does beside the clone: a plain folder is no package."""
    (tmp_path / "dyndet" / "src").mkdir(parents=True)
    line = "import dyndet, dyndet.conf, dyndet.kernels; print(dyndet.__file__); print(dyndet.conf.__file__)"
    line = line.replace(", dyndet.kernels", "")  # which would import torch
    done = subprocess.run(
        [sys.executable, "-c", line], cwd=tmp_path / Path(beside).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    package, conf = map(Path, done.stdout.split())
    assert package == Path(dyndet.__file__) and conf.with_name("train.yaml").is_file()


def test_the_door_reaches_a_command(tmp_path: Path) -> None:
    result = forked(tmp_path, "__main__", "report", "runs=nowhere")
    assert result.returncode == 2 and "nowhere" in result.stderr and "Traceback" not in result.stderr
