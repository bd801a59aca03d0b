"""The fine-grained head on a GPU: nothing waits for the device, and a CUDA graph holds the whole head."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dyndet.models.heads.fine_grained import FineGrainedHead

pytestmark = pytest.mark.gpu
SHAPES = [(25, 42), (13, 21), (7, 11)]


def pyramid(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(1, 64, *shape, device="cuda", generator=generator) for shape in SHAPES]


def head(norm_stats: str, impl: str = "auto") -> FineGrainedHead:
    torch.manual_seed(0)
    module = FineGrainedHead(64, depth=2, norm_groups=8, norm_stats=norm_stats, scale_init=0.5, impl=impl)  # type: ignore[arg-type]
    for node in [*module.cls, *module.reg]:
        for gate in node.gates.values():  # type: ignore[union-attr]
            gate.conv.weight.data.normal_(std=0.2)
            gate.conv.bias.data.fill_(-0.3)
    return module.cuda().to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


@pytest.fixture
def strict() -> Iterator[None]:
    """Any wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 1e-4 * b.norm())


@pytest.fixture(autouse=True)
def _in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared may run on different executions, which round TF32 differently."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("norm_stats", ["active", "position"])
def test_kernels_equal_the_dense_execution(norm_stats: str) -> None:
    features = pyramid()
    with torch.no_grad():
        sparse, dense = (head(norm_stats, impl)(features) for impl in ("triton", "dense"))
    for a, b in zip(sparse.cls + sparse.reg, dense.cls + dense.reg, strict=True):
        assert close(a, b)


@pytest.mark.parametrize("norm_stats", ["active", "position"])
def test_nothing_waits(norm_stats: str, request: pytest.FixtureRequest) -> None:
    module, features = head(norm_stats), pyramid()
    with torch.no_grad():
        module(features)  # compiles the kernels, builds the index tables
        request.getfixturevalue("strict")
        module(features)


@pytest.mark.parametrize("norm_stats", ["active", "position"])
def test_a_graph_replays_the_head_on_other_masks(norm_stats: str) -> None:
    module, static = head(norm_stats), pyramid()
    stream = torch.cuda.Stream()
    with torch.no_grad():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            module(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = module(static)
        for seed in (1, 2):
            fresh = pyramid(seed)
            expected = module(fresh)
            for into, x in zip(static, fresh, strict=True):
                into.copy_(x)
            graph.replay()
            for a, b in zip(captured.cls + captured.reg, expected.cls + expected.reg, strict=True):
                assert close(a, b)
