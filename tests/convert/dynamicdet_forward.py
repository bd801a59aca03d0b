"""What a DynamicDet file computes, as the networks are described: in float64, straight from its tensors by number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from dynamicdet_layouts import Variant
from torch import Tensor


def widened(x: Tensor, times: int) -> Tensor:
    """Nearest."""
    return x.repeat_interleave(times, 2).repeat_interleave(times, 3)


def reorganised(x: Tensor) -> Tensor:
    """(row, column) offsets (0,0), (1,0), (0,1), (1,1)."""
    return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)


class ReleasedNetwork:
    """One file.

    Args:
        weights: by their names in the file.
        variant: which network.
        cross: the first transition of the second backbone reads the first backbone with its convolutions.
    """

    def __init__(self, weights: Mapping[str, Tensor], variant: Variant, *, cross: bool = False) -> None:
        self.weights = {name: value.double() for name, value in weights.items()}
        self.variant = variant
        self.cross = cross

    def norm(self, name: str, x: Tensor) -> Tensor:
        gain, shift, mean, var = (
            self.weights[f"{name}.{part}"].view(-1, 1, 1) for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / torch.sqrt(var + 1e-3) * gain + shift

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        kernel = self.weights[f"{name}.conv.weight"]
        y = self.norm(f"{name}.bn", F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2))
        return y * y.sigmoid()

    def elan(self, part: str, at: Sequence[int], x: Tensor, taps: Sequence[int]) -> Tensor:
        """The taps from the deepest to the shallowest, the second branch, the first branch."""
        first, second = self.conv(f"{part}.{at[0]}", x), self.conv(f"{part}.{at[1]}", x)
        chain = [second]
        for number in at[2:-1]:
            chain.append(self.conv(f"{part}.{number}", chain[-1]))
        return self.conv(f"{part}.{at[-1]}", torch.cat([*(chain[tap] for tap in taps), second, first], 1))

    def halved(self, part: str, at: Sequence[int], x: Tensor, other: Tensor | None = None) -> Tensor:
        """A strided convolution; or the convolutions' way, then the pool's."""
        if len(at) == 1:
            return self.conv(f"{part}.{at[0]}", x, 2)
        pool, before, down = (f"{part}.{number}" for number in at)
        convolved = self.conv(down, self.conv(before, x if other is None else other), 2)
        return torch.cat([convolved, self.conv(pool, F.max_pool2d(x, 2))], 1)

    def sppcspc(self, name: str, x: Tensor) -> Tensor:
        y = self.conv(f"{name}.cv4", self.conv(f"{name}.cv3", self.conv(f"{name}.cv1", x)))
        pooled = [F.max_pool2d(y, size, 1, size // 2) for size in (5, 9, 13)]
        y = self.conv(f"{name}.cv6", self.conv(f"{name}.cv5", torch.cat([y, *pooled], 1)))
        return self.conv(f"{name}.cv7", torch.cat([y, self.conv(f"{name}.cv2", x)], 1))

    def last(self, name: str, x: Tensor) -> Tensor:
        """A convolution, in YOLOv7 the sum of two."""
        if f"{name}.conv.weight" in self.weights:
            return self.conv(name, x)
        wide = F.conv2d(x, self.weights[f"{name}.rbr_dense.0.weight"], padding=1)
        point = F.conv2d(x, self.weights[f"{name}.rbr_1x1.0.weight"])
        y = self.norm(f"{name}.rbr_dense.1", wide) + self.norm(f"{name}.rbr_1x1.1", point)
        return y * y.sigmoid()

    def backbone(self, part: str, image: Tensor, first: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The outputs of all stages; with those of the first backbone, the second."""
        stem, entrances, elans = self.variant.backbone(second=first is not None)
        if self.variant.pool:
            x = self.conv(f"{part}.{stem[1]}", self.conv(f"{part}.{stem[0]}", image), 2)
            x = self.joined(x, first, 0)
        else:
            x = reorganised(image)
        outputs = [self.conv(f"{part}.{stem[-1]}", x)]
        for stage, (enter, at) in enumerate(zip(entrances, elans, strict=True), 1):
            other = first[1] if self.cross and first is not None and stage == 2 else None
            x = self.joined(self.halved(part, enter, outputs[-1], other), first, stage)
            outputs.append(self.elan(part, at, x, self.variant.taps))
        return outputs

    def joined(self, x: Tensor, first: Sequence[Tensor] | None, stage: int) -> Tensor:
        """With what the links bring from this stage of the first backbone and all after it."""
        if first is None:
            return x
        begin = 0 if self.variant.pool else 1  # W6 has no link at the stem
        for source in range(max(stage, begin), len(first)):
            name = f"model_b2.{source - begin}.conv"
            y = F.conv2d(first[source], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])
            # One piece for every stage from the first to the source; all before ours lie before it.
            before = sum(self.entered(earlier) for earlier in range(begin, stage))
            x = x + widened(y[:, before : before + x.shape[1]], 2 ** (source - stage))
        return x

    def entered(self, stage: int) -> int:
        """Channels after the entrance of a stage: what its ELAN (at the stem, its last convolution) reads."""
        stem, _, elans = self.variant.backbone(second=True)
        number = elans[stage - 1][0] if stage else stem[-1]
        return self.weights[f"model_b2.{number}.conv.weight"].shape[1]

    def head(self, part: str, maps: Sequence[Tensor]) -> list[Tensor]:
        """Per level (B, 3, H, W, 5 + K)."""
        variant, at = self.variant, iter(self.variant.head())
        levels = list(maps[-variant.levels :])
        levels[-1] = self.sppcspc(f"{part}.{next(at)[0]}", levels[-1])
        for level in reversed(range(variant.levels - 1)):
            coarser = widened(self.conv(f"{part}.{next(at)[0]}", levels[level + 1]), 2)
            lateral = self.conv(f"{part}.{next(at)[0]}", levels[level])
            levels[level] = self.elan(part, next(at), torch.cat([lateral, coarser], 1), variant.neck_taps)
        for level in range(1, variant.levels):
            x = torch.cat([self.halved(part, next(at), levels[level - 1]), levels[level]], 1)
            levels[level] = self.elan(part, next(at), x, variant.neck_taps)
        levels = [self.last(f"{part}.{number}", x) for number, x in zip(next(at), levels, strict=True)]
        detect = f"{part}.{next(at)[0]}"
        found = []
        for level, x in enumerate(levels):
            kernel, bias = (self.weights[f"{detect}.m.{level}.{name}"] for name in ("weight", "bias"))
            y = F.conv2d(x + self.weights[f"{detect}.ia.{level}.implicit"], kernel, bias)
            y = self.weights[f"{detect}.im.{level}.implicit"] * y
            found.append(y.view(len(y), 3, -1, *y.shape[-2:]).permute(0, 1, 3, 4, 2))
        return found

    def easiness(self, maps: Sequence[Tensor]) -> Tensor:
        """(B,), after the sigmoid."""
        x = torch.cat([x.mean((2, 3), keepdim=True) for x in maps], 1)
        x = F.conv2d(x, self.weights["router.layer1.weight"], self.weights["router.layer1.bias"]).relu()
        return F.conv2d(x, self.weights["router.layer2.weight"], self.weights["router.layer2.bias"]).sigmoid().flatten()
