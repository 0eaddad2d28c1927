"""Matrices outside of experts that a checkpoint has encoded, decoded for torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from moesaic import _core
from moesaic._errors import error_of
from moesaic.safetensors.errors import as_format_errors
from moesaic.safetensors.experts import recognise
from moesaic.safetensors.names import Matrix, values_name
from moesaic.safetensors.quantization import Quantization
from moesaic.safetensors.reader import FLOATS, Checkpoint


class EncodedLinears:
    """Those of a model that a folder has in other forms than floats."""

    def __init__(self, folder: str, model: nn.Module) -> None:
        self.folder, self.checkpoint = folder, Checkpoint(folder)
        self.quantization = Quantization.of(self.checkpoint)
        #: (out, in, whether there is a bias, element type) by the name of the module.
        self.wanted = {
            name: (module.out_features, module.in_features, module.bias is not None,
                   module.weight.dtype)
            for name, module in model.named_modules()
            if type(module) is nn.Linear and self._is_encoded(name)
        }  # fmt: skip

    def _is_encoded(self, name: str) -> bool:
        found = values_name(self.checkpoint, name)
        return found is not None and self.checkpoint.entry(found).dtype not in (*FLOATS, "F64")

    def module(self, name: str) -> nn.Linear:
        """The decoded one of this name. Raises FormatError where the tensors do not fit it."""
        rows, columns, has_bias, dtype = self.wanted[name]
        with as_format_errors(self.folder):
            one = recognise(self.checkpoint, Matrix(name, ()), self.quantization, exact=True)
            if (one.n, one.k) != (rows, columns):
                raise error_of(
                    _core.FormatError, "from_pretrained", one.name,
                    f"[{rows}, {columns}], as the model has it", f"[{one.n}, {one.k}]",
                )  # fmt: skip
            values, factor = one.values()
            bias = one.bias() if has_bias else None
        if has_bias and bias is None:
            raise error_of(_core.FormatError, "from_pretrained", f"{name}.bias", "a tensor", "none")
        made = nn.Linear(columns, rows, has_bias, device="meta")
        weight = torch.from_numpy(np.ascontiguousarray(values * np.float32(factor)))
        made.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        if bias is not None:
            made.bias = nn.Parameter(torch.from_numpy(bias).to(dtype), requires_grad=False)
        return made
