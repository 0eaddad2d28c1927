"""Rows of a table that stays encoded."""

from __future__ import annotations

from os import PathLike

import torch

from moesaic import _core
from moesaic._errors import error_of
from moesaic.torch.frozen import FrozenTable
from moesaic.torch.state import FrozenModule


class Embedding(FrozenModule):
    """What ``torch.nn.Embedding`` gives, over a tensor of a GGUF file.

    The rows that a call asks for are decoded; the others stay in the file's pages. It has no
    parameters and no gradients.

    Parameters
    ----------
    file : GgufFile
        The model.
    name : str
        Name of the tensor [rows, K].
    dtype : torch.dtype
        Element type of the results.

    Raises
    ------
    FormatError
        No such tensor, or one of another number of dimensions.

    Examples
    --------
    >>> import torch
    >>> import moesaic as mo
    >>> from moesaic.torch import Embedding
    >>> _ = mo.testing.write_moe_gguf("model.gguf")  # a small model with random weights
    >>> router = Embedding.from_gguf("model.gguf", "blk.0.ffn_gate_inp.weight")
    >>> router(torch.tensor([[0, 1, 0]])).shape
    torch.Size([1, 3, 256])
    """

    _weights: FrozenTable

    def __init__(self, file: _core.GgufFile, name: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        shape = file.tensors[name].shape if name in file.tensors else None
        if shape is None or len(shape) != 2:
            got = "none" if shape is None else str(list(shape))
            raise error_of(_core.FormatError, "Embedding", name, "a tensor [rows, K]", got)
        self._weights = FrozenTable(file, name)
        self.dtype = dtype

    @classmethod
    def from_gguf(
        cls,
        file: _core.GgufFile | str | PathLike[str],
        name: str,
        dtype: torch.dtype = torch.float32,
    ) -> Embedding:
        """Open a tensor of a GGUF file.

        Parameters
        ----------
        file : GgufFile or path
            The model.
        name : str
            Name of the tensor [rows, K], such as 'token_embd.weight'.
        dtype : torch.dtype
            Element type of the results.

        Returns
        -------
        Embedding

        Raises
        ------
        FileNotFoundError, OSError
            The file is absent or cannot be read.
        FormatError
            As the constructor.
        """
        return cls(file if isinstance(file, _core.GgufFile) else _core.GgufFile(file), name, dtype)

    @property
    def num_embeddings(self) -> int:
        """Rows."""
        return self._weights.rows

    @property
    def embedding_dim(self) -> int:
        """K."""
        return self._weights.columns

    @property
    def nbytes(self) -> int:
        """Bytes of the table in its file."""
        return self._weights.nbytes

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Decode rows.

        Parameters
        ----------
        ids : int tensor [...]
            Numbers of rows.

        Returns
        -------
        tensor [..., K]

        Raises
        ------
        ShapeError
            A number out of range.
        """
        out: torch.Tensor = torch.ops.moesaic.embedding(ids, self._weights.number, self.dtype)
        return out

    def extra_repr(self) -> str:
        """Return sizes, type and bytes."""
        table = self._weights
        return f"{table.rows}, {table.columns}, {table.quant}, {table.nbytes / 2**20:.1f} MiB"
