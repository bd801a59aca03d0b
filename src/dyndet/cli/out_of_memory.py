"""Memory that runs out, in one line: at what, how large it was, and what to set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from dyndet.errors import MemoryShortageError
from dyndet.structures import Batch, ImageBatch

T = TypeVar("T")

_WORDS = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "ALLOC_FAILED",
    "alloc_cpu", "DefaultCPUAllocator",
)  # fmt: skip


@dataclass
class Work:
    """What a command is at, for the line.

    Attributes:
        doing: "training", "validation", ...
        sizes: (height, width) of every image of the batch.
        padded: (height, width) of the batch.
        other: a batch of something else, in words.
    """

    doing: str
    sizes: list[tuple[int, int]] = field(default_factory=list)
    padded: tuple[int, int] = (0, 0)
    other: str = ""

    def see(self, batch: Any) -> None:
        """Notes the batch that is worked on."""
        images: Any = batch.images if isinstance(batch, Batch) else batch
        if isinstance(images, ImageBatch):
            self.sizes = [(height, width) for height, width in images.sizes.tolist()]
            self.padded = (images.pixels.shape[-2], images.pixels.shape[-1])
        else:
            self.sizes, self.other = [], f"at a batch of {len(images[0])} lessons"

    def of(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, each noted when it comes."""
        for batch in batches:
            self.see(batch)
            yield batch

    def batch(self) -> str:
        """In words."""
        if not self.sizes:
            return self.other or "before its first batch"
        height, width = self.padded
        images = f"{len(self.sizes)} image{'s' * (len(self.sizes) != 1)}"
        shown = ", ".join(f"{h} x {w}" for h, w in dict.fromkeys(sorted(self.sizes, reverse=True)[:8]))
        return f"at a batch of {images} of {shown} (H x W), padded to {height} x {width}"


@contextmanager
def explained(work: Work, advice: Callable[[], str]) -> Iterator[None]:
    """Says in one line where memory ran out in this block.

    Args:
        work: what is done.
        advice: what to set, asked when it is needed.

    Raises:
        MemoryShortageError: instead of what torch raises.
    """
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        raise MemoryShortageError(
            f"out of memory in {work.doing} {work.batch()}{_peak()} ({said(error)}): {advice()}",
            doing=work.doing,
            images=len(work.sizes),
        ) from error


def advice(batch_size: int, elsewhere: str) -> str:
    """What to set for a detector that is used, not trained.

    Args:
        batch_size: of images, as it is.
        elsewhere: the key that chooses the CPU.
    """
    smaller = f"set data.batch_size={batch_size // 2}" if batch_size > 1 else "set a smaller +data.size"
    return f"{smaller}, or {elsewhere}"


def ran_out(error: BaseException) -> bool:
    """Whether an exception says that there is no more memory, of a device or of the host."""
    if isinstance(error, MemoryShortageError):
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def said(error: BaseException) -> str:
    """What torch or the system says of it, shortened."""
    lines = [line for line in str(error).splitlines() if any(word in line for word in _WORDS)]
    text = (lines or str(error).splitlines() or [type(error).__name__])[0].partition(". GPU ")[0]
    return text if len(text) <= 120 else f"{text[:117]}..."


def _peak() -> str:
    if not torch.cuda.is_available():
        return ""
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return f", after a peak of {torch.cuda.max_memory_allocated() / 2**30:.1f} of {total / 2**30:.1f} GiB"
