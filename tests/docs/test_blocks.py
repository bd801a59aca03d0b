"""Every command and every block of code in the README and in docs/ does what the page says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from blocks import PAGES, Block, blocks_of, check_block
from sandbox import Sandbox

README_MARKS = {"import dyndet": ("slow",)}
"""How blocks of the README are tested, by how they start: it shows no comments for tests."""

README_GIVEN = """
import torch

images = torch.rand(1, 3, 128, 128)
targets = [{"boxes": torch.tensor([[10.0, 20.0, 60.0, 80.0]]), "labels": torch.tensor([1])}]
"""
"""What code in the README takes as given."""


def marked(block: Block) -> Block:
    for start, mark in README_MARKS.items() if block.page == "README.md" else ():
        if block.text.startswith(start):
            return replace(block, mark=mark, text=README_GIVEN + block.text)
    return block


BLOCKS = [marked(block) for page in PAGES for block in blocks_of(page)]
REAL = [
    pytest.param(block, marks=pytest.mark.slow) if block.how == "slow" else block
    for block in BLOCKS
    if block.how in ("run", "slow") or (block.language == "python" and not block.how)
]


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS}))
def test_commands_are_understood(page: str) -> None:
    """Each composes its configuration, of a sweep for every value; values are of the right kind."""
    for block in BLOCKS:
        if block.page != page:
            continue
        assert not block.pending, f"{block} is marked as pending: take the mark out"
        assert block.how != "skip" or len(block.mark) > 1, f"{block}: say why it is not run"
        check_block(block)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("sandbox"))


@pytest.mark.parametrize("block", REAL, ids=str)
def test_blocks_run(block: Block, sandbox: Sandbox) -> None:
    sandbox.run(block)


def test_a_mistake_in_a_page_is_found() -> None:
    wrong = [
        "dyndet train budget.wieght=1", "dyndet trian", "make trian", "dyndet train head.depth=deep", "frobnicate",
        "dyndet train -m head=plain_small,plane_small", "pip install dyndet[nothing]", "python scripts/get_coco.py --x",
    ]  # fmt: skip
    for text in wrong:
        with pytest.raises(AssertionError):
            check_block(Block("page.md", 1, "bash", text))
