"""Checks that look into image files: whether they can be read, and whether two show the same."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from os import cpu_count
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dyndet.checkup.finding import Finding, Place, first_few, many
from dyndet.checkup.split import Split
from dyndet.data.images import Header, read_header
from dyndet.errors import DataError
from dyndet.structures import Size

NIL_CONTRAST = 8
"""An image whose values span no more than this, of 0..255, shows nothing."""
GRID = 10
BITS_APART = 10
"""Of 200: prints this close are called near duplicates."""


@dataclass(frozen=True)
class Look:
    """What one image looks like.

    Attributes:
        split: it lies in.
        index: of the image.
        content: digest of the file, or of the pixels where there is none.
        print: 200 bits that small changes of an image leave as they are.
        span: of its values, 0..255.
        header: of the file; None where there is none.
        problem: why it could not be read; the others are meaningless then.
    """

    split: Split
    index: int
    content: bytes = b""
    print: int = 0
    span: int = 0
    header: Header | None = None
    problem: str = ""

    @property
    def told(self) -> Size | None:
        """(H, W) that annotations are for, where they say."""
        return self.split.size(self.index) if self.split.sized[self.index] else None


def look_at(
    splits: Sequence[Split], *, images: int | None = None, track: Callable[[Iterable], Iterable] = iter
) -> list[Look]:
    """Decodes the images of all splits.

    Args:
        splits: of one data set.
        images: so many of each split, evenly spread; None takes all.
        track: wraps the work, to show its progress.
    """
    jobs = []
    for split in splits:
        count = len(split) if images is None else min(images, len(split))
        jobs += [(split, position * len(split) // count) for position in range(count)]
    with ThreadPoolExecutor(min(8, cpu_count() or 1)) as pool:
        return list(track(pool.map(lambda job: _look(*job), jobs)))


def check_pictures(looks: Sequence[Look]) -> list[Finding]:
    """All checks of what was seen."""
    return unreadable(looks) + without_contrast(looks) + turned(looks) + same_pictures(looks)


def unreadable(looks: Sequence[Look]) -> list[Finding]:
    bad = [look for look in looks if look.problem]
    if not bad:
        return []
    places = [Place(look.split.name, look.index, look.problem) for look in bad]
    text = f"{len(bad)} of {len(looks)} images cannot be read"
    advice = "replace them, or take them out of the labels: one of them ends a training"
    return [Finding("unreadable images", "error", text, len(bad), advice, first_few(places))]


def without_contrast(looks: Sequence[Look]) -> list[Finding]:
    flat = [look for look in looks if not look.problem and look.span <= NIL_CONTRAST]
    if not flat:
        return []
    places = [look.split.at_image(look.index, f"values span {look.span} of 255") for look in flat]
    share = len(flat) / len(looks)
    text = f"{len(flat)} of {len(looks)} images show nothing: pixels that are nearly the same"
    advice = "black or washed-out files, or values in a range that their format does not tell"
    severity = "error" if share > 0.5 else "warning"
    return [Finding("images without contrast", severity, text, len(flat), advice, first_few(places))]


def turned(looks: Sequence[Look]) -> list[Finding]:
    """Images that their EXIF orientation turns, by how they are read."""
    found: dict[tuple[bool, bool], list[Look]] = defaultdict(list)
    for look in looks:
        if look.header is not None and look.header.orientation != 1:
            told, header = look.told, look.header
            tells = told is not None and header.stored != header.upright
            found[tells, header.reads_upright(told, look.split.upright)].append(look)
    findings = []
    for (tells, upright), group in sorted(found.items()):
        how = "read upright, as annotation tools show them" if upright else "read unturned, as their labels are"
        text = f"{many(len(group), 'image')} with an EXIF orientation: {how}"
        text += "" if tells else "; their sizes do not tell whether labels are meant so"
        advice = "other tools may show boxes and images apart; to be sure, save the images upright, without the tag"
        places = [look.split.at_image(look.index) for look in group]
        severity = "note" if tells and upright else "warning"
        findings.append(Finding("EXIF orientation", severity, text, len(group), advice, first_few(places)))
    return findings


def same_pictures(looks: Sequence[Look]) -> list[Finding]:
    """Equal files and near duplicates; worst where one trains and the other evaluates."""
    seen = [look for look in looks if not look.problem and look.span > NIL_CONTRAST]
    exact = [pair for group in _groups(seen, lambda look: look.content) for pair in _chained(group)]
    equal = {(id(one), id(other)) for one, other in exact}
    near = [
        pair for pair in _near(seen) if (id(pair[0]), id(pair[1])) not in equal and pair[0].content != pair[1].content
    ]
    findings = []
    for pairs, how in ((exact, "the same"), (near, "nearly the same")):
        across = [pair for pair in pairs if pair[0].split is not pair[1].split]
        within = [pair for pair in pairs if pair[0].split is pair[1].split]
        if across:
            text = f"{many(len(across), 'image')} of val: {how} as one of train"
            advice = "the AP is too good: keep copies and neighbouring frames in one split"
            severity = "error" if how == "the same" else "warning"
            findings.append(Finding("leaks between splits", severity, text, len(across), advice, _places(across)))
        if within:
            text = f"{many(len(within), 'image')}: {how} as another one of the split"
            advice = "copies weigh more in training and in AP: fine if meant"
            severity = "warning" if how == "the same" else "note"
            findings.append(Finding("repeated images", severity, text, len(within), advice, _places(within)))
    return findings


def fingerprint(image: Image.Image) -> int:
    """200 bits: in a coarse grid, which of two neighbours is brighter, to the right and below."""
    grey = np.asarray(image.convert("F").resize((GRID + 1, GRID + 1), Image.Resampling.BICUBIC))
    across, down = grey[:GRID, 1:] > grey[:GRID, :-1], grey[1:, :GRID] > grey[:-1, :GRID]
    bits = np.concatenate([across.ravel(), down.ravel()])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _look(split: Split, index: int) -> Look:
    path = split.paths[index]
    try:
        pixels = split.dataset[index].image
        header = read_header(path) if path else None
    except DataError as error:
        return Look(split, index, problem=str(error))
    span = int(pixels.max()) - int(pixels.min())
    data = Path(path).read_bytes() if path else pixels.numpy().tobytes()
    digest = hashlib.blake2b(data, digest_size=16).digest()
    picture = Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    return Look(split, index, digest, fingerprint(picture), span, header)


def _groups(looks: Sequence[Look], key: Callable[[Look], object]) -> list[list[Look]]:
    found: dict[object, list[Look]] = defaultdict(list)
    for look in looks:
        found[key(look)].append(look)
    return [group for group in found.values() if len(group) > 1]


def _chained(group: Sequence[Look]) -> list[tuple[Look, Look]]:
    """Each of the group with the first one, training first."""
    return [(group[0], other) for other in group[1:]]


def _near(looks: Sequence[Look]) -> list[tuple[Look, Look]]:
    """Each image with the closest earlier one that is at most `BITS_APART` away.

    Two such prints share at least one of eleven 19-bit words: eleven bits would have to differ otherwise.
    """
    closest: dict[int, tuple[int, Look, Look]] = {}
    for word in range(BITS_APART + 1):
        for group in _groups(looks, lambda look, shift=19 * word: (look.print >> shift) & 0x7FFFF):
            for one, other in combinations(group[:500], 2):  # images of one colour share words by the thousand
                apart = (one.print ^ other.print).bit_count()
                if apart <= BITS_APART and apart < closest.get(id(other), (BITS_APART + 1,))[0]:
                    closest[id(other)] = (apart, one, other)
    return [(one, other) for _, one, other in sorted(closest.values(), key=lambda item: item[0])]


def _places(pairs: Sequence[tuple[Look, Look]]) -> tuple:
    return first_few([other.split.at_image(other.index, f"as {_path(one)}") for one, other in pairs])


def _path(look: Look) -> str:
    return look.split.paths[look.index] or f"image {look.index} of {look.split.name}"
