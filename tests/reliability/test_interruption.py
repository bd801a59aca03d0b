"""Runs that are asked to end: where they do, and that nothing of them is lost."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from faults import interruptions, runs

from dyndet.lightning.interruption import how_to_go_on
from dyndet.signals import CODES, Interrupted, deferred, forget, listening, received, stop


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of a command that starts."""
    before = {name: signal.getsignal(getattr(signal, name)) for name in CODES}
    for name in CODES:
        signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["fine-grained, averaged", "cascade"])
def test_a_run_ends_as_if_it_had_not_been_interrupted(family: str, tmp_path: Path) -> None:
    for outcome in islice(interruptions.interrupted(family, tmp_path), 2):
        assert outcome.survived, outcome


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 143)])
def test_a_command_ends_where_it_stands(name: str, code: int) -> None:
    with pytest.raises(Interrupted) as error, listening():
        os.kill(os.getpid(), getattr(signal, name))
    assert error.value.code == code and error.value.name == name
    assert received() is None


@pytest.mark.parametrize("asked", [True, False])
def test_training_is_only_told(asked: bool) -> None:
    told: list[str | None] = []
    with pytest.raises(Interrupted) as error, deferred(lambda: told.append("others")):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        told.append(received())
        if asked:
            stop(str(received()))
    assert told == ["others", "SIGTERM"] and error.value.code == 143


def test_a_signal_that_somebody_handles_stays_his() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    with listening():
        os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [signal.SIGTERM] and received() is None


def test_ignored_interrupts_stay_ignored() -> None:
    """Shells start jobs in the background so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with listening():
        os.kill(os.getpid(), signal.SIGINT)


def test_what_was_received_can_be_done_with() -> None:
    with listening():
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)
        forget()
        assert received() is None


class Deleted:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_is_not_lost_where_exceptions_are(capfd: pytest.CaptureFixture[str]) -> None:
    """They are ignored in `__del__`."""
    with pytest.raises(Interrupted) as error, listening():
        Deleted()
        for _ in range(1000):
            time.sleep(0.01)
    assert error.value.code == 130 and not capfd.readouterr().err


def ends_with(act: Callable[[], None]) -> int | None:
    process = get_context("fork").Process(target=act)
    process.start()
    process.join(timeout=60)
    process.kill()
    return process.exitcode


def test_a_second_interrupt_ends_at_once() -> None:
    def act() -> None:
        with deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat theirs
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(1)

    assert ends_with(act) == 130


@pytest.mark.slow
def test_processes_of_a_loader_leave_signals_to_the_run(tmp_path: Path) -> None:
    """Those to its whole group, as a terminal and schedulers send them; and none is left over."""

    def act() -> None:
        os.setpgid(0, 0)
        runs.Disturb.actions.append(lambda: os.killpg(0, signal.SIGINT))
        runs.run("fine-grained", tmp_path, "data.num_workers=2", runs.disturbed("on_before_backward", 3))

    assert ends_with(act) == 130
    assert runs.content(tmp_path)["global_step"] == 3


def broken() -> None:
    raise KeyError("in the step")


@pytest.mark.slow
def test_a_step_that_fails_is_rolled_back(tmp_path: Path) -> None:
    """Weights, running statistics and random state are those before it."""
    runs.Disturb.actions.append(broken)
    with pytest.raises(KeyError):
        runs.run("fine-grained", tmp_path / "cut", runs.disturbed("on_after_backward", 6))
    runs.run("fine-grained", tmp_path / "cut", f"ckpt_path={tmp_path}/cut/checkpoints/last.ckpt")
    runs.run("fine-grained", tmp_path / "whole")
    assert not runs.differences(tmp_path / "whole", tmp_path / "cut")


def test_the_reader_of_a_pipe_may_go_first(tmp_path: Path) -> None:
    """Ctrl-C ends a `tee` behind it, too."""
    reading, writing = os.pipe()

    def act() -> None:
        os.close(reading)
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        told: list[bool] = []
        try:
            with deferred(lambda: told.append(True)):
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(3):
                    print("a step", flush=True)
                    sys.stderr.write("more")
                    sys.stderr.flush()
                stop("SIGINT")
        finally:
            os._exit(0 if told else 1)

    process = get_context("fork").Process(target=act)
    process.start()
    os.close(reading)
    os.close(writing)
    process.join(timeout=60)
    assert process.exitcode == 0


@pytest.mark.parametrize("asked", ["ckpt_path=/backup/model.ckpt", "+experiment=shapes_dyn"])
@pytest.mark.parametrize("saved", [None, 3, 7])
def test_the_command_that_goes_on_names_what_is_there(
    asked: str, saved: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 7 was reached; what lies there may be of another step, or nothing."""
    monkeypatch.setattr(sys, "argv", ["train", asked])
    last = tmp_path / "last.ckpt"
    if saved is not None:
        torch.save({"global_step": saved}, last)
    text = how_to_go_on(last, 7)
    resumed = "ckpt_path" in asked
    if saved is None or (saved == 3 and resumed):
        assert text.startswith("nothing was saved") and text.endswith(f"dyndet.train {asked}")
    else:
        assert text.startswith("saved" if saved == 7 else f"{last} is of step 3")
        assert text.endswith(f"ckpt_path={last}") and (asked in text) != resumed
