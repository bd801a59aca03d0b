"""Files of weights, read without executing anything in them unless that is asked for."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dyndet.errors import UserError
from dyndet.sealed import fault

_ZIP = b"PK\x03\x04"  # torch.save since 1.6
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before
_PICKLE = b"\x80"

_ARRAYS = {
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),  # how old pickles write bytes
}


@dataclass(frozen=True)
class Source:
    """A file of weights.

    Attributes:
        path: where it lies.
        weights: tensors by name, without the prefix that parallel training adds.
        meta: what the file says about itself; empty where it says nothing.
    """

    path: Path
    weights: dict[str, Tensor]
    meta: Mapping[str, Any]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.weights.items()}


class _ArrayUnpickler(pickle.Unpickler):
    """Admits numpy arrays and plain containers, nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # its name before numpy 2
        if (module, name) not in _ARRAYS:
            raise pickle.UnpicklingError(f"{module}.{name} is not an array")
        return super().find_class(module, name)


def read_source(path: str | Path, *, trust: bool = False) -> Source:
    """Reads a torch file, a pickle of numpy arrays (detectron2's .pkl) or a .safetensors file.

    Args:
        path: the file.
        trust: unpickle whatever it holds, which can run any code in it.

    Raises:
        UserError: if it is missing, damaged, not a file of weights, a checkpoint of ours, or holds more than plain data
            and is not trusted.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file at {path.resolve()}: set source to a downloaded checkpoint")
    content = _content(path, trust)
    if isinstance(content, Mapping) and "dyndet" in content:
        raise UserError(f"{path} is a checkpoint of dyndet already: give it to dyndet.predict as ckpt={path}")
    weights, meta = content, {}
    if isinstance(content, Mapping):
        known = ("state_dict", "ema", "model")  # averaged weights are the result of a run, where there are any
        weights = next((content[key] for key in known if content.get(key) is not None), content)
        meta = content.get("meta")
    if isinstance(weights, nn.Module):  # only where its class was trusted
        weights = weights.state_dict()
    if not isinstance(weights, Mapping):
        raise UserError(f"{path} holds a {type(weights).__name__}, not tensors by name")
    tensors = {str(key): _tensor(value) for key, value in weights.items()}
    found = {key.removeprefix("module."): value for key, value in tensors.items() if value is not None}
    if not found:
        raise UserError(f"{path} holds no tensors by name: is it a checkpoint?")
    return Source(path, found, meta if isinstance(meta, Mapping) else {})


def _content(path: Path, trust: bool) -> Any:
    with path.open("rb") as file:
        head = file.read(len(_LEGACY))
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if head.startswith(_ZIP) and (found := fault(path)) is not None:
            raise RuntimeError(found)
        if head.startswith((_ZIP, _LEGACY)):
            return torch.load(path, map_location="cpu", weights_only=not trust)
        if head.startswith(_PICKLE):
            with path.open("rb") as file:
                reader = pickle.Unpickler if trust else _ArrayUnpickler
                return reader(file, encoding="latin1").load()
    except ImportError as error:
        raise UserError(
            f"{path} needs the module {error.name!r} to be unpickled: install it, or save its tensors alone"
        ) from error
    except pickle.UnpicklingError as error:
        _refuse(path, error)
    except (RuntimeError, EOFError, KeyError, ValueError, OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged or only half there: {_line(error)}. Download it again") from error
    raise UserError(f"{path} is not a checkpoint: neither a torch file nor a pickle nor .safetensors")


def _refuse(path: Path, error: pickle.UnpicklingError) -> NoReturn:
    text = str(error)
    if "truncated" in text or "Ran out of input" in text:
        raise UserError(f"{path} is damaged or only half there: {_line(error)}. Download it again") from error
    wanted = re.search(r"GLOBAL (\S+)", text) or re.search(r"(\S+) is not an array", text)
    name = wanted.group(1) if wanted else "a class of its own"
    raise UserError(
        f"{path} holds more than tensors: it wants to run {name}, which can be any code. If you trust where it comes "
        "from, add trust=true"
    ) from error


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(np.array(value))
    return None


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
