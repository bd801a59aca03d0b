"""How full the plans of a step will be, told from how full those of earlier steps were.

On a GPU the rows are counted on the device, and waiting for a count would cost more than it tells. So a step sends its
counts off, and a later one takes them over if they have arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dyndet.ops.sparse.backend import Impl, resolve
from dyndet.ops.sparse.plan import reached
from dyndet.routing import Work


class NodeDensity(NamedTuple):
    """Shares of all positions that the plans of a node are expected to hold; None where nobody knows.

    Attributes:
        down: what is sent to coarser levels.
        up: what is sent to finer levels.
        inner: the first convolution of the depth path, around open gates.
        outer: the second one, at open gates.
    """

    down: float | None
    up: float | None
    inner: float | None
    outer: float | None

    @classmethod
    def of_gates(cls, share: float | None) -> NodeDensity:
        """What to expect where this share of all gates is open."""
        return cls(share, share, reached(share, 1), share)


class DensityEstimate:
    """Expected densities of a head, by node: those of an earlier step, until one is known the same for all.

    It is a hint which execution to take and the one thing a head remembers. Executions compute the same, so it never
    changes a result. It is no part of a state dict; copies and pickles know what was known, not what is on its way.
    While a CUDA graph is being captured it learns nothing: the graph keeps what was expected then.

    Args:
        openness: share of open gates to expect before any count has arrived.
    """

    def __init__(self, openness: float) -> None:
        self.openness = openness
        self._known: dict[str, NodeDensity] = {}
        self._coming: Coming | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_coming": None}

    def of(self, node: str) -> NodeDensity:
        """What the plans of a node are expected to hold."""
        return self._known.get(node) or NodeDensity.of_gates(self.openness)

    def refresh(self) -> None:
        """Takes over counts if they have arrived; does not wait for them."""
        if self._coming is None or capturing() or not self._coming.arrival.query():
            return
        shares: dict[str, list[float]] = {}
        for node, rows in zip(self._coming.nodes, self._coming.rows.tolist(), strict=True):
            shares.setdefault(node, []).append(rows / self._coming.positions)
        self._known = {node: NodeDensity(*values) for node, values in shares.items()}
        self._coming = None

    def observe(self, work: Sequence[Work], positions: int) -> None:
        """Sends the row counts of a step off, unless earlier ones are still on their way.

        Args:
            work: of all nodes, each with its four plans in the order of `NodeDensity`.
            positions: P, that could have been active.
        """
        if self._coming is None and positions and not capturing():
            counted = next((item.rows for item in work if isinstance(item.rows, Tensor)), None)
            if counted is not None:
                rows = [x.rows if isinstance(x.rows, Tensor) else counted.new_full((1,), x.rows) for x in work]
                self._coming = Coming([item.node for item in work], *send(torch.cat(rows)), positions)


class Coming(NamedTuple):
    """Row counts on their way to the host, and the event behind them."""

    nodes: list[str]
    rows: Tensor
    arrival: torch.cuda.Event
    positions: int


def send(values: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """Starts a copy from a GPU: page-locked memory that will hold it, and the event that tells when."""
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(values.device))
    return host, event


def counted_later(x: Tensor, impl: Impl) -> bool:
    """Whether rows of `x` are counted on a GPU, in a step that is run and not compiled: the host may learn of it."""
    plain = type(x) in (Tensor, nn.Parameter) and x.is_cuda and not torch.compiler.is_compiling()
    return plain and resolve(impl, x.device) == "triton"


def capturing() -> bool:
    """Whether a CUDA graph is being captured, which no question about events may disturb."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
