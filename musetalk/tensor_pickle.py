"""Unpickling checkpoints without running anything of the file: tensors and containers only."""

from __future__ import annotations

import pickle
from typing import Any


class _Inert(dict[Any, Any]):
    """Stands in for every class a checkpoint's pickle names beside tensors: accepts anything, does nothing."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        super().__init__()

    def __setstate__(self, _state: object) -> None:
        return

    append = extend = __setstate__  # of lists


_HARMLESS = {("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")}


class _TensorUnpickler(pickle.Unpickler):
    """Builds tensors and containers only; every other class becomes inert, so nothing of the file is executed."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HARMLESS or (module == "torch" and name.endswith("Storage")):
            return super().find_class(module, name)
        return _Inert


class TensorPickle:
    """What torch.load asks of a pickle module: it uses `Unpickler` for zip files and `load` for the older ones."""

    __name__ = "tensor_pickle"
    Unpickler = _TensorUnpickler
    UnpicklingError = pickle.UnpicklingError

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        """One pickle, with harmless classes only."""
        return _TensorUnpickler(file, **options).load()
