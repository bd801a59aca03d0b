"""Whether annotations are for upright images or for their stored pixels, judged once per dataset."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dyndet.data.images import Header
from dyndet.structures import Size

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Seen:
    """An image that was looked at.

    Attributes:
        path: the file.
        header: what it says.
        annotated: (H, W) that the annotations are for; None where they do not say.
    """

    path: Path
    header: Header
    annotated: Size | None

    @property
    def tells(self) -> bool:
        """Whether the annotated size says if the image was turned."""
        return self.annotated is not None and self.header.stored != self.header.upright


def judge(seen: Sequence[Seen], source: str | Path, total: int) -> bool:
    """Whether to turn images upright where their sizes do not tell: unless all that tell are annotated as stored.

    What is not plainly upright is said in one warning each, with a count and an example.

    Args:
        seen: images that were looked at.
        source: where the annotations came from, for messages.
        total: images of the dataset.
    """
    turned = [image for image in seen if image.header.orientation != 1]
    stored = [image for image in turned if image.tells and image.annotated == image.header.stored]
    upright = [image for image in turned if image.tells and image.annotated == image.header.upright]
    unknown = [image for image in turned if not image.tells]
    turn = not stored or bool(upright)
    of = f" of the {len(seen)} looked at" if len(seen) < total else ""
    if stored:
        logger.warning(
            "%s: %d images%s are annotated for their stored pixels, not as their EXIF orientation turns them (for "
            "example %s): they are read unturned",
            source, len(stored), of, stored[0].path,
        )  # fmt: skip
    if unknown:
        how = "upright, as annotation tools show them" if turn else "unturned, like those whose sizes tell"
        logger.warning(
            "%s: %d images%s have an EXIF orientation, and their annotations do not say whether it was applied (for "
            "example %s): they are read %s",
            source, len(unknown), of, unknown[0].path, how,
        )  # fmt: skip
    return turn
