"""The pages agree with the program and with each other: links, keys, names, error lines, experiments."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from functools import cache
from itertools import chain
from pathlib import Path

import model_zoo
import pytest
from blocks import PAGES, ROOT
from omegaconf import OmegaConf

from dyndet.cli.compose import compose_command

DOCS = ROOT / "docs"
SOURCE = ROOT / "src" / "dyndet"
NEW_KEYS = {"data.size", "trainer.accumulate_grad_batches"}
"""Keys of parts that are not there yet; remove them as they come."""


def text_of(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^\s*```.*?^\s*```", "", page.read_text(), flags=re.M | re.S)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Links between pages and to headings hold; every page is in the menu."""
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    line = [Path(sys.executable).parent / "zensical", "build", "--strict"]
    built = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    menu = (ROOT / "zensical.toml").read_text()
    for page in DOCS.glob("*.md"):
        assert f'"{page.name}"' in menu, f"zensical.toml does not list {page.name}"
        assert (tmp_path / "site" / page.name).with_suffix(".html").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_links_to_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", text_of(page)):
        if not re.match(r"https?:", target):
            file = (page.parent / target).resolve()
            assert file.exists(), f"{page.name}: {target} does not exist"
            assert page.name == "README.md" or file.is_relative_to(DOCS), f"{page.name}: {target} is not in the site"


COMPOSED = [
    ("evaluate", "ckpt=x"), ("predict", "ckpt=x", "source=x"), ("calibrate", "ckpt=x"), ("report", "runs=x"),
    ("train", "callbacks=[default,ema]", "logger=[csv,wandb]", "neck=bifpn", "head=dyhead_fine_grained_small"),
    ("train", "+experiment=dy_yolov7", "+router=yolo"), ("train", "+experiment=shapes_mask_rcnn", "data=yolo"),
    ("train", "+experiment=bccd_atss", "head=dyhead_towers_small"), ("train", "+experiment=fcos_d8_dyn"),
    ("train", "data=voc", "predictor=retinanet_small", "head=plain_small"),
    ("train", "backbone=vit_small", "neck=simple_pyramid", "head=dyhead_small"),
]  # fmt: skip
"""Together they have every key that a page may name."""


@cache
def known_keys() -> set[str]:
    def keys(node: object, prefix: str) -> set[str]:
        here = {prefix} if prefix else set()
        if not isinstance(node, dict):
            return here
        return here | set(
            chain.from_iterable(keys(value, f"{prefix}.{key}".lstrip(".")) for key, value in node.items())
        )

    found = set()
    for command, *arguments in COMPOSED:
        found |= keys(OmegaConf.to_container(compose_command(command, arguments)), "")
    return found | {"hydra.run.dir", "hydra.sweep.dir"} | NEW_KEYS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_that_a_page_names_exist(page: Path) -> None:
    """`some.key`, `some.key=value`, one or several in a span of code."""
    groups = {key.partition(".")[0] for key in known_keys() if "." in key}
    for span in re.findall(r"`([^`]+)`", text_of(page)):
        for word in span.split():
            key, sign, _ = word.strip("'").partition("=")
            dotted = re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", key) is not None
            if dotted and key.partition(".")[0] in groups and (sign or " " not in span):
                name = f"{page.name}: there is no key {key}"
                assert key in known_keys() or key.endswith((".py", ".md", ".yaml", ".ckpt", ".json")), name


@cache
def messages() -> list[str]:
    """Every text of the program, with "…" for what is put in."""

    def shown(node: ast.expr) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(shown(value) for value in node.values)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"

    trees = (ast.parse(file.read_text()) for file in SOURCE.rglob("*.py"))
    return [shown(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.Constant)]


def test_error_lines_are_those_of_the_program() -> None:
    """What the first column of a table in troubleshooting quotes."""
    tables = text_of(DOCS / "troubleshooting.md").split("| line |")[1:]
    lines = [row.split("|")[1] for table in tables for row in table.split("\n\n")[0].splitlines()[2:]]
    quoted = [quote for line in lines for quote in re.findall(r"`([^`]+)`", line)]
    assert len(quoted) > 20
    of_hydra = {"missing EQUAL", "no viable alternative", "mismatched input"}
    for quote in quoted:
        parts = quote.split("…")
        pattern = re.compile(".*?".join(re.escape(part) for part in parts), re.S)
        said = any(pattern.search(message) for message in messages() if all(part in message for part in parts))
        assert said or quote in of_hydra, f"no message of the program is like {quote!r}"


@pytest.mark.parametrize("page", ["fine_grained.md", "dyhead.md", "dynamicdet.md"])
def test_names_beside_a_file_are_in_it(page: str) -> None:
    """`models/heads/gates.py`: `GateConv`, `gate_logits`."""
    found = re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", text_of(DOCS / page))
    assert len(found) > 3
    for file, names in found:
        content = (SOURCE / file).read_text()
        for name in re.findall(r"\w+", names):
            if not (ROOT / "conf" / "experiment" / f"{name}.yaml").is_file():
                assert re.search(rf"^(class|def) {name}\b", content, re.M), f"{page}: {file} has no {name}"


def test_experiments_that_are_named_exist() -> None:
    for page in PAGES:
        for name in re.findall(
            r"`((?:bccd|shapes|fcos|atss|dy|dyhead|yolov7|mask_rcnn|faster_rcnn)_\w+)`", text_of(page)
        ):
            options = [*(ROOT / "conf").rglob(f"{name.removesuffix('_small')}.yaml")]
            assert options, f"{page.name}: there is no {name}"


def rows() -> dict[str, str]:
    lines = (DOCS / "model_zoo.md").read_text().splitlines()
    return {match[1]: line for line in lines if (match := re.match(r"\| `(\w+)` \|", line))}


def test_the_model_zoo_has_every_experiment() -> None:
    assert set(rows()) == set(model_zoo.experiments()), "run python scripts/model_zoo.py"
    named = {name for family in model_zoo.published().values() for name in family["rows"]}
    assert named <= set(model_zoo.experiments())


@pytest.mark.parametrize("name", ["fcos_r50", "shapes_dy_tiny", "yolov7"])
def test_rows_of_the_model_zoo_are_of_today(name: str) -> None:
    assert rows()[name] == model_zoo.row(name), "run python scripts/model_zoo.py"


def test_prose_and_notes_of_the_model_zoo_are_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    written = rows()
    monkeypatch.setattr(model_zoo, "row", written.__getitem__)
    assert (DOCS / "model_zoo.md").read_text() == model_zoo.page(model_zoo.experiments())
    for name, line in written.items():
        if "`" + name + "`" in line and line.count("|") == 5:  # what its file says
            assert model_zoo.comment(name) in line
