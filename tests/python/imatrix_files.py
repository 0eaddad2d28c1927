"""Importance matrices as llama.cpp's tools write them, in both forms."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

#: Sums [E, K] of squared activations, and tokens [E], by the name of a tensor.
Sums = Mapping[str, tuple[np.ndarray, np.ndarray]]


def write_gguf_form(path: Path, sums: Sums, *, counts: bool = True) -> Path:
    writer = gguf.GGUFWriter(path, "none")
    del writer.kv_data[0]["general.architecture"]  # which such a file has not
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (values, tokens) in sums.items():
        writer.add_tensor(f"{name}.in_sum2", values.astype(np.float32))
        if counts:
            writer.add_tensor(f"{name}.counts", tokens.astype(np.float32).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_dat_form(path: Path, sums: Sums, calls: int = 3, data: str | None = "text.txt") -> Path:
    """Rows are means times the number of calls; those without tokens are all ones then."""
    out = struct.pack("<i", len(sums))
    for name, (values, tokens) in sums.items():
        means = np.where(tokens[:, None] > 0, values / np.maximum(tokens, 1)[:, None], 1)
        text = name.encode()
        out += struct.pack("<i", len(text)) + text + struct.pack("<ii", calls, values.size)
        out += (means * calls).astype("<f4").tobytes()
    if data is not None:
        out += struct.pack("<ii", calls, len(data)) + data.encode()
    path.write_bytes(out)
    return path
