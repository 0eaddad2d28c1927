"""Importance matrices as llama.cpp's tools write them: what the columns of an expert count.

A file has for each tensor of a model, by the name of the tensor, and for each of its experts the
sums over tokens of the squared activations that met its columns. In the newer form, a GGUF file,
these are tensors ``NAME.in_sum2`` [E, K] and ``NAME.counts`` [E, 1]. The older one (``.dat``) is a
number of entries, then for each the length and bytes of NAME, a number of calls, a number of values
and the values [E * K]; numbers are i32 and values f32, little endian. What may follow is of no use.
https://github.com/ggml-org/llama.cpp/tree/master/tools/imatrix

Where the rows lie is all that stays in memory: they are as many as the columns of a model.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moesaic import _core
from moesaic._errors import error_of
from moesaic._files import open_regular, printable, read_into, shown, size_of
from moesaic.saving import names
from moesaic.saving.container import Value
from moesaic.saving.convert.plan import OPERATION, Plan
from moesaic.saving.convert.shards import Shards
from moesaic.saving.tensors import Array

_KEYS = "quantize.imatrix."
#: Of a report, and experts in a line of it.
_LINES = 8
_SUMS, _COUNTS = ".in_sum2", ".counts"
#: The roles whose input is that of a role, so that they have its importances too.
_SAME_INPUT = {"gate": ("gate_up", "up"), "up": ("gate_up", "gate"), "gate_up": ("gate", "up")}

#: The importances of an expert's columns, [K]; None where no token met them.
Rows = Callable[[int], "Array | None"]


@dataclass(frozen=True)
class _Entry:
    """The rows of one tensor: where they begin in a shard, and how many values they are."""

    name: str
    shard: int
    offset: int
    values: int
    #: How many tokens each expert met; None where the values are divided by that already.
    counts: Array | None = None


@dataclass
class Importances:
    """An open file, and what became of it in a conversion."""

    path: str
    source: list[Any]
    _shards: Shards
    _entries: dict[str, _Entry]
    #: Tensors whose columns have importances.
    used: list[str] = field(default_factory=list)
    #: Experts whose columns all count alike, as no token met them, by tensor.
    uniform: dict[str, list[int]] = field(default_factory=dict)
    #: Types that take no importances, of tensors that are encoded.
    without: set[str] = field(default_factory=set)

    def of(self, tensor: str, type: str, experts: int, cols: int) -> Rows:
        """Those of a tensor of routed experts, each of which is read and checked once here.

        Raises FormatError for an entry of other sizes, or with values that are no importances.
        """
        if not _core.quant_types()[type]["takes_weights"]:
            self.without.add(type)
            return lambda _: None
        found = [self._find(tensor, index, experts, cols) for index in range(experts)]
        missing = [index for index, row in enumerate(found) if row is None or not row.any()]
        if len(missing) < experts:
            self.used.append(tensor)
        if missing:
            self.uniform[tensor] = missing
        gone = set(missing)

        def read(expert: int) -> Array | None:
            return None if expert in gone else self._find(tensor, expert, experts, cols)

        return read

    def check(self) -> None:
        """Raises ConfigError and FormatError where a conversion has no use for the file."""
        if self.used:
            return
        if not self.uniform:
            got = f"{', '.join(sorted(self.without)) or 'no matrix that is encoded'}"
            raise error_of(
                _core.ConfigError, OPERATION, "imatrix",
                "a type that takes importances, such as Q4_K or IQ2_XS", got,
            )  # fmt: skip
        wanted = next(iter(self.uniform))
        raise error_of(
            _core.FormatError, OPERATION, self.path, f"data of {wanted} or of others to encode",
            f"none of them, but {shown(next(iter(self._entries)))}",
            "it may be of another model",
        )  # fmt: skip

    def note_in(self, plan: Plan) -> None:
        """What tells this conversion from one without, under the keys of llama.cpp's tools."""
        plan.source.append(self.source)
        for key in [key for key in plan.metadata if key.startswith(_KEYS)]:
            del plan.metadata[key]
        name = Path(self.source[0][0]).name
        plan.metadata[f"{_KEYS}file"] = Value(printable(name), "STRING")
        plan.metadata[f"{_KEYS}entries_count"] = Value(len(self.used), "UINT32")

    def report(self) -> list[str]:
        """Lines on what came of the file."""
        lines = [f"{self.path}: importances of {len(self.used)} tensors"]
        for tensor, experts in list(self.uniform.items())[:_LINES]:
            which = ", ".join(map(str, experts[:_LINES])) + (", ..." * (len(experts) > _LINES))
            lines.append(f"{tensor}: no data for experts {which}: their columns count alike")
        if len(self.uniform) > _LINES:
            lines.append(f"so it is with {len(self.uniform) - _LINES} more tensors")
        if self.without:
            lines.append(f"types that take no importances: {', '.join(sorted(self.without))}")
        return lines

    def facts(self) -> dict[str, Any]:
        """All of the report, for JSON."""
        return {
            "path": self.path, "tensors": len(self.used), "uniform": self.uniform,
            "types_without": sorted(self.without),
        }  # fmt: skip

    def _find(self, tensor: str, expert: int, experts: int, cols: int) -> Array | None:
        """The row of an expert, from the entry of its tensor or of one with the same input."""
        parts = names.EXPERT_WEIGHTS.fullmatch(tensor)
        assert parts is not None, tensor
        alone = parts["expert"]
        for part in (parts["part"], *_SAME_INPUT.get(parts["part"], ())):
            stem = f"blk.{parts['layer']}.ffn_{part}"
            stacked = self._entries.get(f"{stem}_exps.weight")
            if stacked is not None:
                return self._row(stacked, int(alone or expert), None if alone else experts, cols)
            single = self._entries.get(f"{stem}.{alone or expert}.weight")
            if single is not None:
                return self._row(single, 0, 1, cols)
        return None

    def _row(self, entry: _Entry, index: int, rows: int | None, cols: int) -> Array | None:
        if rows is None:  # of one expert; how many there are is not said
            rows = max(index + 1, entry.values // cols)
        if entry.values != rows * cols:
            raise error_of(
                _core.FormatError, OPERATION, f"{self.path}: {entry.name}",
                f"{rows} x {cols} values", str(entry.values), "it may be of another model",
            )  # fmt: skip
        count = 1.0 if entry.counts is None else float(entry.counts[index])
        if not count:
            return None
        data = self._shards.read(entry.shard, entry.offset + 4 * cols * index, 4 * cols)
        row = np.asarray(data.view("<f4"), np.float32)
        if not (np.isfinite(row).all() and (row >= 0).all()):
            at = int(np.flatnonzero(~(np.isfinite(row) & (row >= 0)))[0])
            where = f"{self.path}: {entry.name}[{index}, {at}]"
            expected = "a finite number, 0 or more"
            raise error_of(_core.FormatError, OPERATION, where, expected, f"{row[at]:g}")
        return row / np.float32(count)


def rows_of(
    importances: Importances | None, tensor: str, type: str, experts: int, cols: int
) -> Rows:
    """``Importances.of``; without a file all columns count alike."""
    return importances.of(tensor, type, experts, cols) if importances else lambda _: None


@contextmanager
def opened(path: Path) -> Iterator[Importances]:
    """A file in either form, open for as long as the block.

    Raises FormatError for one that is neither, and OSError where it cannot be opened.
    """
    with open_regular(path) as file:
        start = bytearray(4)
        read_into(file, memoryview(start))
    if start != b"GGUF":
        with Shards([str(path)]) as shards:
            entries = _entries_of_dat(path)
            yield Importances(printable(str(path)), [_identity(str(path))], shards, entries)
        return
    with _core.GgufFile(path) as gguf, Shards(gguf.shard_paths) as shards:
        entries = _entries_of_gguf(path, gguf, shards)
        source = [_identity(one) for one in gguf.shard_paths]
        yield Importances(printable(str(path)), source, shards, entries)


def _identity(path: str) -> list[Any]:
    status = Path(path).stat()
    return [path, status.st_size, status.st_mtime_ns]


def _wrong(path: Path, what: str, expected: str, got: str) -> _core.FormatError:
    where = f"{path}: {what}" if what else str(path)
    return error_of(_core.FormatError, OPERATION, where, expected, got)


def _entries_of_gguf(path: Path, gguf: _core.GgufFile, shards: Shards) -> dict[str, _Entry]:
    entries = {}
    for sums in gguf.tensors.values():
        if not sums.name.endswith(_SUMS):
            continue
        name = sums.name.removesuffix(_SUMS)
        counts = gguf.tensors.get(name + _COUNTS)
        rows = math.prod(sums.shape[:-1])
        if counts is None or math.prod(counts.shape) != rows:
            got = "none" if counts is None else str(list(counts.shape))
            raise _wrong(path, shown(name + _COUNTS), f"{rows} numbers", got)
        for tensor in (sums, counts):
            if tensor.quant != "F32":
                raise _wrong(path, shown(tensor.name), "F32", tensor.quant)
        data = shards.read(counts.shard, counts.offset, 4 * rows)
        tokens = np.asarray(data.view("<f4"), np.float32)
        if not (np.isfinite(tokens).all() and (tokens >= 0).all()):
            raise _wrong(path, shown(counts.name), "finite numbers, 0 or more", "others")
        entries[name] = _Entry(name, sums.shard, sums.offset, math.prod(sums.shape), tokens)
    if not entries:
        raise _wrong(path, "", f"tensors NAME{_SUMS} of an importance matrix", "none")
    return entries


def _entries_of_dat(path: Path) -> dict[str, _Entry]:
    entries = {}
    with open_regular(path) as file:
        size = size_of(file)

        def bytes_of(count: int, what: str) -> bytes:
            left = size - file.tell()
            if not 0 <= count <= left:
                raise _wrong(path, what, f"at most the {left} bytes to its end", str(count))
            data = bytearray(count)
            read_into(file, memoryview(data))
            return bytes(data)

        def number(what: str) -> int:
            return int(struct.unpack("<i", bytes_of(4, what))[0])

        count = number("number of entries")
        for index in range(count):
            what = f"entry {index}"
            if not 0 < (length := number(what)) < 1 << 16:
                expected = "the name of a tensor, as in llama.cpp's importance matrices"
                raise _wrong(path, what, expected, f"{length} bytes")
            name = bytes_of(length, what).decode("utf-8", "surrogateescape")
            number(what)  # calls, which all rows are multiplied by
            values, offset = number(what), file.tell()
            if not 0 < values <= (size - offset) // 4:
                expected = f"1 to {(size - offset) // 4} values, which are there"
                raise _wrong(path, f"{what}, {shown(name)}", expected, str(values))
            entries[name] = _Entry(name, 0, offset, values)
            file.seek(offset + 4 * values)
    if not entries:
        raise _wrong(path, "", "an importance matrix, as a GGUF file or .dat", f"{count} entries")
    return entries
