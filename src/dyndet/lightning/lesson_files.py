"""Lessons on the disk: tensors with a digest of them, one file per chunk. None runs code, damaged ones are seen."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dyndet.disk import about_the_disk, flush_folder, part_of, sweep
from dyndet.errors import WriteError
from dyndet.lightning.router_module import Lesson


class LessonFile:
    """A chunk of lessons in its folder.

    Args:
        folder: of one detector and one training set.
        number: of the chunk; a file under the number of another is as good as damaged.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / f"{number:05d}.safetensors"
        self.number = number

    def read(self, images: int) -> Lesson | None:
        """What it holds; None where it has to be computed, with a warning if that is because it is damaged.

        Args:
            images: that it is of.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                lesson = Lesson(*(file.get_tensor(name) for name in Lesson._fields))
                digest = (file.metadata() or {}).get("digest")
            if digest == self._digest(lesson) and len(lesson.pooled) == lesson.losses.shape[1] == images:
                return lesson
        except (SafetensorError, OSError, RuntimeError, LookupError, ValueError, TypeError):
            pass  # another digest, no such tensor, no such type: all is damage
        rank_zero_warn(f"lessons: {self.path} is damaged, so that it is computed again")
        return None

    def write(self, lesson: Lesson) -> Lesson:
        """All or nothing: an interruption leaves no half file.

        Raises:
            WriteError: if the disk does not take it.
        """
        lesson = Lesson(*(tensor.cpu().contiguous() for tensor in lesson))
        content = save(lesson._asdict(), metadata={"digest": self._digest(lesson)})
        part = part_of(self.path)
        try:
            sweep(self.path.parent)
            part.write_bytes(content)
            part.replace(self.path)
            flush_folder(self.path.parent)
        except OSError as error:
            raise WriteError(about_the_disk(error, self.path, len(content))) from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        return lesson

    def _digest(self, lesson: Lesson) -> str:
        digest = hashlib.sha256(str(self.number).encode())
        for name, tensor in lesson._asdict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def joined(parts: Sequence[Lesson]) -> Lesson:
    """One lesson of all images, in order."""
    return Lesson(torch.cat([part.pooled for part in parts]), torch.cat([part.losses for part in parts], 1))


def about_kept(folder: Path) -> str:
    """Whether a folder has lessons, in a few words."""
    if any(folder.glob("*.safetensors")):
        return "kept from an earlier pass"
    return "new; the .pt files there are of an earlier dyndet and not read" if any(folder.glob("*.pt")) else "new"
