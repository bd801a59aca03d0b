"""Paths arrive as they were typed, or say which quotes help."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dyndet.cli.quoting import check_single, check_words, expand_home, flags_and_overrides, quote, read_paths
from dyndet.errors import UserError

KEYS = ["ckpt", "source", "data.root", "+data.val_annotations", "backbone.weights", "hydra.run.dir"]
TEXT = st.text(
    st.characters(exclude_categories=("C", "Z")) | st.sampled_from(" =([{,'\"~#%$)]}\\./:@!&|;<>?*+-"), min_size=1
)


def received(argument: str) -> object:
    """What lies in a configuration after Hydra's own parser and OmegaConf have read an argument."""
    parsed = OverridesParser.create().parse_override(argument)
    return OmegaConf.create({"value": parsed.value()}).value


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(KEYS), TEXT)
@example("ckpt", "outputs/x/checkpoints/epoch=0-step=3.ckpt")
@example("ckpt", "runs/a (1)/last.ckpt")
@example("ckpt", "runs/[x]/last.ckpt")
@example("data.root", "2017")
@example("data.root", " 1e3 ")
@example("source", "a,b")
@example("source", "str(1)")
@example("source", "bilder/größe 日本.jpg")
@example("ckpt", "{a:1}")
@example("ckpt", 'it\'s "b"')
def test_a_path_arrives_as_it_was_typed(key: str, path: str) -> None:
    # These mean something: a home folder, lists, quotes, escapes, interpolations, nothing.
    assume(path[0] != "~" and path[0] + path[-1] not in ("[]", "''", '""') and path.lower() not in ("null", "???"))
    assume("\\" not in path and "${" not in path)
    (argument,), _ = read_paths([f"{key}={path}"])
    assert received(argument) == path
    assert read_paths([argument]) == ([argument], {})  # further processes of a run read it once more


@settings(max_examples=100, deadline=None)
@given(TEXT)
@example("a\\")
@example("\\${x}'\"")
def test_quotes_keep_any_text(text: str) -> None:
    assert received(f"ckpt={quote(text)}") == text


@pytest.mark.parametrize(
    "argument",
    [
        "ckpt=a\\=b.ckpt", "ckpt='a=b.ckpt'", 'ckpt="~/x"', "ckpt=null", "ckpt=???", "out=${runs}/x",
        "source=[a.jpg,b.jpg]", "data.train_images=8", "optim.optimizer.lr=1e-3", "name=x", "~ckpt", "--cfg",
    ],
)  # fmt: skip
def test_what_means_something_stays(argument: str) -> None:
    assert read_paths([argument]) == ([argument], {})


def test_sweeps_stay_sweeps() -> None:
    for argument in ("ckpt=a,b", "ckpt=choice(a,b)", "data.root=glob(*)"):
        assert read_paths(["-m", argument])[0] == ["-m", argument]
    _, argument = read_paths(["-m", "ckpt=e=1.ckpt,b (2).ckpt"])[0]
    swept = OverridesParser.create().parse_override(argument)
    assert swept.is_sweep_override()
    assert [received(f"ckpt={item}") for item in swept.sweep_string_iterator()] == ["e=1.ckpt", "b (2).ckpt"]
    assert received(read_paths(["ckpt=a,b"])[0][0]) == "a,b"  # no sweep: one path
    assert received(read_paths(["source=[a (1).jpg,b.jpg]"])[0][0]) == ["a (1).jpg", "b.jpg"]


def test_what_is_there_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("[a,b]", "a,b", "x\\=y"):
        Path(name).touch()
        assert received(read_paths(["-m", f"source={name}"])[0][1]) == name


def test_a_home_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/some one")
    (argument,), changed = read_paths(["ckpt=~/a=b.ckpt"])
    assert received(argument) == "/home/some one/a=b.ckpt"
    assert changed == {"ckpt=~/a=b.ckpt": argument}
    config = OmegaConf.create({
        "data": {"root": "~/coco", "images": "${data.root}/x", "list": ["~/no"]}, "source": ["~/a", "b"], "name": "~/x",
    })  # fmt: skip
    expand_home(config)
    assert config.data.images == f"{os.environ['HOME']}/coco/x"
    assert list(config.source) == ["/home/some one/a", "b"]
    assert config.name == "~/x" and config.data.list[0] == "~/no"  # no paths


def test_a_list_in_place_of_a_path_says_how_to_quote() -> None:
    with pytest.raises(UserError, match=r"ckpt must be one path.* in quotes twice, 'ckpt=\"\[...\]\"'"):
        check_single(OmegaConf.create({"ckpt": ["a"]}))


def test_words_that_set_nothing_are_told() -> None:
    check_words(["a=1", "-m", "--config-dir", "x", "~b", "--info", "config", "--cfg", "job"])
    for line in (["shapes"], ["help"], ["data.root", "=", "photos"], ["data.root=", "photos"]):
        with pytest.raises(UserError, match="sets nothing: write KEY=VALUE"):
            check_words(line)


def test_keys_with_dashes_are_told_from_flags() -> None:
    for line, meant in (
        (["--experiment=finetune"], r"\+experiment=finetune"),
        (["--data.root=a", "x=1"], r"data\.root=a"),
        (["--ckpt_path", "last"], "ckpt_path=last"),
        (["--seed"], "seed=VALUE"),
    ):
        with pytest.raises(UserError, match=f"keys have no dashes; write {meant}$"):
            check_words(line)


def test_flags_may_stand_anywhere() -> None:
    line = ["a=1", "-m", "--config-dir", "x=y", "~b", "--cfg", "job", "c=2", "--config-dir=z=1"]
    assert flags_and_overrides(line) == (
        ["-m", "--config-dir", "x=y", "--cfg", "job", "--config-dir=z=1"],
        ["a=1", "~b", "c=2"],
    )
