"""The experts of a whole model, checked and not read: where each lies, and in which form.

``MoeExpertStore`` takes this. Its disk tier reads an expert when a call needs it, and makes of it
what ``EncodedExperts.gather`` or ``Int4Experts.gather`` would have made.
"""

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moesaic import _core
from moesaic.safetensors.encoded import Encoded, Stored
from moesaic.safetensors.errors import as_format_errors
from moesaic.safetensors.experts import EncodedExperts, gather_all
from moesaic.safetensors.int4 import Int4Experts, stored_linear
from moesaic.safetensors.ints import Linear
from moesaic.safetensors.layer import OpenedLayer, open_layer
from moesaic.safetensors.reader import Array, Checkpoint, TensorEntry, unsupported
from moesaic.safetensors.sets import layers_with_experts

_WAY_OUT = "moesaic convert FOLDER model.gguf writes a file that open_store reads"
#: What reads words as such needs them at whole ones.
_WORD = 4


class CheckpointExperts:
    """The experts of all layers of a checkpoint.

    ``files`` are (path, bytes) of those that hold experts. Each of ``layers`` has the number of its
    ``block``, the ``shape`` (E, H, I), its ``roles`` by name as fields of ``StoredRole``, and the
    ``ranges`` int64 [E, pieces, 3] of (file, offset, bytes).
    """

    def __init__(self, path: str | os.PathLike[str], prefix: str | None = None) -> None:
        """Open it, or the part of the model that ``prefix`` says, as ``gather_layer`` does.

        Raises as that; UnsupportedError naming what cannot be read so.
        """
        self.name = str(Path(os.fsdecode(path)).absolute())
        self._prefix = prefix
        self._files: dict[str, int] = {}
        self.files: list[tuple[str, int]] = []
        with as_format_errors(self.name):
            self._checkpoint = Checkpoint(path)
            blocks = layers_with_experts(self._checkpoint, prefix)
            self.layers = [self._layer(block) for block in blocks]
            self._times = {name: Path(name).stat().st_mtime_ns for name, _ in self.files}

    def layer_arguments(
        self, block: int, config: _core.MoeConfig | None, top_k: int | None
    ) -> dict[str, Any]:
        """The arguments of MoeLayer but the stack, read now; ``shared`` as ``gather_layer``."""
        with as_format_errors(self.name):
            opened = self._open(block, config, top_k)
            shared = None if opened.shared is None else gather_all([opened.shared], None)[0]
            return {**opened.arguments, "shared": shared}

    def facts(self) -> dict[str, Any]:
        """What tells the files from later ones of the same names."""
        digest = hashlib.sha256(repr(self._checkpoint.json("config.json")).encode())
        for layer in self.layers:
            digest.update(repr((layer["block"], layer["shape"])).encode())
            digest.update(layer["ranges"].tobytes())
        files = {name: (size, self._times[name]) for name, size in self.files}
        return {"files": files, "experts": digest.hexdigest()}

    def __reduce__(self) -> tuple[Any, ...]:
        from moesaic._pickling import checkpoint_experts

        return checkpoint_experts, (self.name, self.facts(), self._prefix)

    def _open(
        self, block: int, config: _core.MoeConfig | None = None, top_k: int | None = None
    ) -> OpenedLayer:
        return open_layer(self._checkpoint, block, prefix=self._prefix, config=config, top_k=top_k)

    def _layer(self, block: int) -> dict[str, Any]:
        experts = self._open(block).routed
        roles, pieces = (
            _int4_roles(experts) if isinstance(experts, Int4Experts) else _encoded_roles(experts)
        )
        shape = (experts.num_experts, experts.hidden_size, experts.intermediate_size)
        ranges = np.array([[self._range(*one) for one in each] for each in pieces], np.int64)
        return {"block": block, "shape": shape, "roles": roles, "ranges": ranges}

    def _range(self, name: str, index: int | None) -> tuple[int, int, int]:
        entry = self._checkpoint.entry(name)
        begin, size = _slice_of(entry, index)
        path = str(entry.path)
        if path not in self._files:
            self._files[path] = len(self.files)
            self.files.append((path, entry.path.stat().st_size))
        return self._files[path], begin, size


def _slice_of(entry: TensorEntry, index: int | None) -> tuple[int, int]:
    """The first byte of a tensor or of a slice of it, and how many."""
    if index is None:
        return entry.begin, entry.end - entry.begin
    size = (entry.end - entry.begin) // entry.shape[0]
    return entry.begin + index * size, size


def _encoded_roles(
    experts: EncodedExperts,
) -> tuple[dict[str, dict[str, Any]], list[list[tuple[str, int | None]]]]:
    """The fields of each role by its name, and the pieces of each expert."""
    roles: dict[str, dict[str, Any]] = {}
    pieces: list[list[tuple[str, int | None]]] = [[] for _ in range(experts.num_experts)]
    for names, group in experts.encoded.items():
        stored = [_stored(one) for one in group]
        if len(names) == 1 and all(map(_are_rows, group, stored)):
            stored = [replace(what, form="rows") for what in stored]
        first = len(pieces[0])
        fields = _common(group, stored, first)
        for mine, what in zip(pieces, stored, strict=True):
            mine += what.pieces
        factors = np.array([_factor(experts, names, e) for e in range(len(group))], np.float32)
        biases = _biases(group)
        for i, name in enumerate(names):
            rows = experts.rows_of(i, len(names), group[0].n)
            roles[name] = fields | {
                "first_row": rows.start,
                "row_step": rows.step or 1,
                "factor": factors if (factors != 1).any() else None,
                "bias": None if biases is None else np.ascontiguousarray(biases[:, rows]),
            }
    return roles, pieces


def _stored(one: Encoded) -> Stored:
    stored = one.stored()
    if stored is None:
        raise unsupported(
            f"tensor {one.name!r}", "experts that are read one by one as they are stored",
            f"{one.checkpoint.entry(one.name).dtype} ({one.label})", _WAY_OUT,
        )  # fmt: skip
    return stored


def _are_rows(one: Encoded, stored: Stored) -> bool:
    """Whether kernels read the bytes of the file where they were read to."""
    if stored.form != "floats" or stored.facts["transposed"]:
        return False
    name, index = stored.values
    entry = one.checkpoint.entry(name)
    return _slice_of(entry, index)[0] % (4 if entry.dtype == "F32" else 2) == 0


def _common(group: list[Encoded], stored: list[Stored], first: int) -> dict[str, Any]:
    """The fields that all experts of a role have; its pieces begin at number ``first``."""
    for one, what in zip(group, stored, strict=True):
        if (what.form, what.facts) != (stored[0].form, stored[0].facts):
            raise unsupported(
                f"tensor {one.name!r}", f"the form of {group[0].name!r}", "another", _WAY_OUT
            )
    one = group[0]
    source = f"{one.name} ({one.label})"
    if len(group) > 1 and one.matrix.index is None:
        source = f"{group[0].name} to {group[-1].name} ({one.label})"
    return {
        **_fields(stored[0], first),
        "type": one.type,
        "matrix_rows": one.n,
        "source": source,
        "decision": one.decision,
        "reason": "read when a call needs it",
        "names": [each.name for each in group],
    }


def _fields(stored: Stored, first: int) -> dict[str, Any]:
    numbers = iter(range(first, first + 3))
    return {
        "form": stored.form,
        "values": next(numbers),
        "scales": -1 if stored.scales is None else next(numbers),
        "zeros": -1 if stored.zeros is None else next(numbers),
        **stored.facts,
    }


def _factor(experts: EncodedExperts, names: tuple[str, ...], expert: int) -> float:
    factor = experts.encoded[names][expert].factor()
    if names == ("down",) and experts.output_scales is not None:
        factor *= float(experts.output_scales[expert])
    return factor


def _biases(group: list[Encoded]) -> Array | None:
    """f32 [E, n], or None where no expert has one."""
    found = [one.bias() for one in group]
    if all(bias is None for bias in found):
        return None
    lacking = next((one for one, bias in zip(group, found, strict=True) if bias is None), None)
    if lacking is not None:
        raise unsupported(
            f"bias of {lacking.name!r}", "one, as other experts have", "none", _WAY_OUT
        )
    return np.stack([bias for bias in found if bias is not None])


def _int4_roles(
    experts: Int4Experts,
) -> tuple[dict[str, dict[str, Any]], list[list[tuple[str, int | None]]]]:
    """``_encoded_roles`` of experts that stay INT4."""
    roles: dict[str, dict[str, Any]] = {}
    pieces: list[list[tuple[str, int | None]]] = [[] for _ in range(experts.num_experts)]
    for names, group in experts.linears.items():
        if len(names) > 1 or experts.scales_outputs:
            raise unsupported(
                f"tensor {group[0].qweight!r}", "INT4 of one role without factors on its outputs",
                "gate and up in one" if len(names) > 1 else "factors", _WAY_OUT,
            )  # fmt: skip
        stored = [_stored_int4(linear) for linear in group]
        first = len(pieces[0])
        scales = {
            linear.checkpoint.entry(linear.tensor("scales")).dtype
            for other, linears in experts.linears.items()
            for linear in linears
            if (other == ("down",)) == (names == ("down",))
        }
        for linear, what in zip(group, stored, strict=True):
            if what.facts != stored[0].facts or len(what.pieces) != len(stored[0].pieces):
                raise unsupported(
                    f"tensor {linear.qweight!r}", f"the form of {group[0].qweight!r}", "another",
                    _WAY_OUT,
                )  # fmt: skip
        for mine, what in zip(pieces, stored, strict=True):
            mine += what.pieces
        roles[names[0]] = {
            **_fields(stored[0], first),
            "matrix_rows": group[0].n,
            "scale_f32": scales != {"F16"},
            "symmetric": experts.scheme.symmetric,
            "source": f"{group[0].qweight} to {group[-1].qweight} (INT4)",
            "decision": "repacked",
            "reason": "read when a call needs it",
            "names": [linear.matrix.base for linear in group],
        }
    return roles, pieces


def _stored_int4(linear: Linear) -> Stored:
    stored = stored_linear(linear)
    if stored is None:
        raise unsupported(
            f"tensor {linear.qweight!r}", "INT4 with its columns in order, as GPTQ, AWQ or"
            " compressed-tensors pack it", "another order or form", _WAY_OUT,
        )  # fmt: skip
    for name, index in stored.pieces:
        if _slice_of(linear.checkpoint.entry(name), index)[0] % _WORD:
            raise unsupported(
                f"tensor {name!r}", "words that begin at a multiple of 4 bytes", "others", _WAY_OUT
            )
    return stored
