"""Mean and standard deviation of pixels, where a release keeps them as tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dyndet.convert.source import Source
from dyndet.errors import UserError


def pixel_settings(source: Source, known: Mapping[str, Sequence[float]]) -> tuple[dict[str, list[float]], list[str]]:
    """What a file says otherwise than is known: settings of `preprocess` in 0..1, and remarks for the user.

    Args:
        source: with `pixel_mean` (detectron2, cvpods) or `data_preprocessor.mean` (mmdetection) in 0..255 and in the
            order in which the network reads the channels, likewise std.
        known: `preprocess.mean` and `preprocess.std` of the recipe or the experiment.

    Raises:
        UserError: unless they are three numbers, and those of std positive.
    """
    settings: dict[str, list[float]] = {}
    remarks = []
    for key, ours in known.items():
        kind = key.removeprefix("preprocess.")
        for name in (f"pixel_{kind}", f"data_preprocessor.{kind}"):
            if name not in source.weights:
                continue
            tensor = source.weights[name].double()
            values = tensor.flatten().tolist()
            if len(values) != 3 or not all(map(math.isfinite, values)) or (kind == "std" and min(values) <= 0):
                shown = values if len(values) <= 4 else f"of shape {tuple(tensor.shape)}"
                wanted = "three positive numbers" if kind == "std" else "three numbers"
                raise UserError(f"{source.path}: {name} is {shown}, not {wanted}, one per channel")
            theirs = [float(f"{value:.7g}") / 255 for value in values]  # as written, before they became float32
            if not _close(theirs, ours):
                settings[key] = theirs
                if _close(theirs, ours[::-1]):
                    remarks.append(
                        f"{name} is what was expected in reverse: if the network reads channels in the other order, "
                        "which no tensor tells, preprocess.bgr is to be changed"
                    )
    return settings, remarks


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(one, other, strict=True))
