"""INT4 experts from safetensors checkpoints: GPTQ, AWQ and pack-quantized ones.

The file format is read here, without the ``safetensors`` package: a header of names, and one
``read`` per tensor, so that a load holds little more than its result.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moesaic import _core

Array = npt.NDArray[Any]

_MAX_HEADER = 100 << 20  # as the format's reference implementation
_DTYPES: dict[str, type[np.generic]] = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16,
    "F16": np.float16, "BF16": np.uint16, "U32": np.uint32, "I32": np.int32, "F32": np.float32,
    "U64": np.uint64, "I64": np.int64, "F64": np.float64, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8,
}  # fmt: skip


def _wrong(where: str, expected: str, got: object) -> _core.FormatError:
    return _core.FormatError(f"load_from_safetensors: {where}: expected {expected}, got {got}")


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: its file, type name, shape and absolute byte range."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} twice")
    return found


def _json(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _wrong(where, "a JSON object", error) from None
    if not isinstance(value, dict):
        raise _wrong(where, "a JSON object", type(value).__name__)
    return value


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one file. Raises FormatError for a header that is not what the format says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise _wrong(
                f"{path} header", f"at most {min(max(size - 8, 0), _MAX_HEADER)} bytes", length
            )
        header = _json(file.read(length), f"{path} header")
    first = 8 + length
    entries = {}
    for name, facts in header.items():
        if name != "__metadata__":
            entries[name] = _entry(path, name, facts, first, size)
    return entries


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _entry(path: Path, name: str, facts: Any, first: int, size: int) -> TensorEntry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(facts, dict):
        raise _wrong(where, "an object", type(facts).__name__)
    dtype, shape, offsets = (facts.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        raise _wrong(f"{where} dtype", "a type name", repr(dtype))
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise _wrong(f"{where} shape", "sizes", repr(shape)[:80])
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise _wrong(f"{where} data_offsets", "[begin, end]", repr(offsets)[:80])
    begin, end = first + offsets[0], first + offsets[1]
    if not begin <= end <= size:
        raise _wrong(f"{where} data_offsets", f"a range within {size - first} bytes", offsets)
    if dtype in _DTYPES:
        elements = 1
        for dim in shape:
            elements *= dim
        needed = elements * np.dtype(_DTYPES[dtype]).itemsize
        if end - begin != needed:
            raise _wrong(
                f"{where} data_offsets", f"{needed} bytes for {dtype} {shape}", end - begin
            )
    return TensorEntry(path, dtype, tuple(shape), begin, end)


class Checkpoint:
    """The tensors and configuration of a model: a folder, one file, or an index file.

    Raises FileNotFoundError, and FormatError for malformed headers or an index that disagrees
    with them.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(2, "No such file or directory", str(path))
        self.folder = path if path.is_dir() else path.parent
        self.tensors: dict[str, TensorEntry] = {}
        index = self._index_of(path)
        if index is not None:
            self._read_index(index)
            return
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(2, "No .safetensors file in", str(path))
        for file in files:
            for name, entry in read_header(file).items():
                if name in self.tensors:
                    raise _wrong(
                        f"{file}: tensor {name!r}",
                        "a name that no other file has",
                        f"the same in {self.tensors[name].path}",
                    )
                self.tensors[name] = entry

    @staticmethod
    def _index_of(path: Path) -> Path | None:
        if path.is_file():
            return path if path.name.endswith(".json") else None
        found = sorted(path.glob("*.safetensors.index.json"))
        if len(found) > 1:
            raise _wrong(str(path), "one index file", ", ".join(file.name for file in found))
        return found[0] if found else None

    def _read_index(self, index: Path) -> None:
        weight_map = _json(index.read_bytes(), str(index)).get("weight_map")
        if not isinstance(weight_map, dict):
            raise _wrong(f"{index} weight_map", "an object", type(weight_map).__name__)
        headers: dict[str, dict[str, TensorEntry]] = {}
        for name, shard in weight_map.items():
            # A shard lies beside its index, never elsewhere.
            if (
                not isinstance(shard, str)
                or not shard
                or Path(shard).name != shard
                or "\\" in shard
            ):
                raise _wrong(f"{index}: tensor {name!r}", "a file name", repr(shard))
            if shard not in headers:
                file = index.parent / shard
                if not file.is_file():
                    raise _wrong(f"{index}: tensor {name!r}", f"the file {shard}", "no such file")
                headers[shard] = read_header(file)
            if name not in headers[shard]:
                raise _wrong(f"tensor {name!r}", f"to be in {shard}, as {index.name} says", "none")
            self.tensors[name] = headers[shard][name]

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder, or None."""
        file = self.folder / name
        return _json(file.read_bytes(), str(file)) if file.is_file() else None

    def read(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> Array:
        """One tensor, checked. bf16 comes as f32. Raises FormatError naming the tensor."""
        entry = self.entry(name)
        if entry.dtype not in dtypes:
            raise _wrong(f"tensor {name!r} dtype", " or ".join(dtypes), entry.dtype)
        if entry.shape != shape:
            raise _wrong(f"tensor {name!r} shape", list(shape).__repr__(), list(entry.shape))
        values = np.empty(shape, _DTYPES[entry.dtype])
        with entry.path.open("rb", buffering=0) as file:
            file.seek(entry.begin)
            left = memoryview(values.reshape(-1).view(np.uint8).data)
            while left:
                count = file.readinto(left)
                if not count:
                    raise _wrong(
                        f"tensor {name!r}", f"{len(left)} more bytes", "the end of the file"
                    )
                left = left[count:]
        if entry.dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values

    def entry(self, name: str) -> TensorEntry:
        if name not in self.tensors:
            raise _wrong(f"tensor {name!r}", "to be there", "no such tensor")
        return self.tensors[name]


class _Fields:
    """Fields of a configuration, checked for their types."""

    def __init__(self, source: str, fields: dict[str, Any]) -> None:
        self.source, self.fields = source, fields

    def get(self, kind: type, *names: str) -> Any:
        """The first of ``names`` that is there and not null, else None."""
        for name in names:
            value = self.fields.get(name)
            if value is None:
                continue
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise _wrong(f"{self.source} {name}", kind.__name__, repr(value))
            return value
        return None

    def unsupported(self, name: str, expected: str, got: object) -> _core.UnsupportedError:
        return _core.UnsupportedError(
            f"load_from_safetensors: {self.source} {name}: expected {expected}, got {got!r}"
        )

    def four_bits(self, *names: str) -> None:
        bits = self.get(int, *names)
        if bits != 4:
            raise _wrong(f"{self.source} {names[0]}", "4", bits)

    def group_size(self, *names: str) -> int:
        size = self.get(int, *names)
        if size is None:
            return 128
        if size != -1 and not 1 <= size < 1 << 31:
            raise _wrong(f"{self.source} {names[0]}", "-1 or a positive number", size)
        return int(size)


@dataclass(frozen=True)
class Quantization:
    """What the configuration says of the quantised tensors; None where it does not say."""

    format: Literal["gptq", "gptq_v2", "awq", "pack_quantized"]
    group_size: int
    act_order: bool | None
    symmetric: bool | None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Quantization":
        model = checkpoint.json("config.json") or {}
        text = model.get("text_config")
        source, config = "config.json", model.get("quantization_config")
        if config is None and isinstance(text, dict):
            config = text.get("quantization_config")
        for name in ("quantize_config.json", "quant_config.json"):
            if config is None:
                source, config = name, checkpoint.json(name)
        if not isinstance(config, dict):
            raise _wrong(
                str(checkpoint.folder),
                "quantize_config.json, or quantization_config in config.json",
                "neither",
            )
        fields = _Fields(source, config)
        method = fields.get(str, "quant_method") or ("awq" if "w_bit" in config else "gptq")
        if method == "gptq":
            return cls._gptq(fields)
        if method == "awq":
            return cls._awq(fields)
        if method == "compressed-tensors":
            return cls._compressed_tensors(fields)
        raise fields.unsupported("quant_method", "gptq, awq or compressed-tensors", method)

    @classmethod
    def _gptq(cls, fields: _Fields) -> "Quantization":
        fields.four_bits("bits")
        facts = (
            fields.group_size("group_size"),
            fields.get(bool, "desc_act"),
            fields.get(bool, "sym"),
        )
        form = fields.get(str, "checkpoint_format") or "gptq"
        if form == "gptq":
            return cls("gptq", *facts)
        if form == "gptq_v2":
            return cls("gptq_v2", *facts)
        raise fields.unsupported("checkpoint_format", "gptq or gptq_v2", form)

    @classmethod
    def _awq(cls, fields: _Fields) -> "Quantization":
        fields.four_bits("bits", "w_bit")
        version = (fields.get(str, "version") or "gemm").lower()
        if version != "gemm":
            raise fields.unsupported("version", "gemm", version)
        zero_point = fields.get(bool, "zero_point")
        size = fields.group_size("group_size", "q_group_size")
        return cls("awq", size, False, None if zero_point is None else not zero_point)

    @classmethod
    def _compressed_tensors(cls, fields: _Fields) -> "Quantization":
        groups = fields.get(dict, "config_groups") or {}
        schemes = [g for g in groups.values() if isinstance(g, dict)]
        if len(schemes) != 1:
            raise fields.unsupported("config_groups", "one scheme for all", len(groups))
        form = schemes[0].get("format") or fields.get(str, "format")
        if form != "pack-quantized":
            raise fields.unsupported("format", "pack-quantized", form)
        weights = schemes[0].get("weights")
        if not isinstance(weights, dict):
            raise _wrong(f"{fields.source} config_groups weights", "an object", weights)
        scheme = _Fields(f"{fields.source} config_groups", weights)
        scheme.four_bits("num_bits")
        kind = scheme.get(str, "type") or "int"
        if kind != "int":
            raise scheme.unsupported("type", "int", kind)
        strategy = scheme.get(str, "strategy") or "group"
        if strategy not in ("group", "channel"):
            raise scheme.unsupported("strategy", "group or channel", strategy)
        order = scheme.get(str, "actorder")
        return cls(
            "pack_quantized",
            -1 if strategy == "channel" else scheme.group_size("group_size"),
            True if order in ("group", "dynamic") else None,
            scheme.get(bool, "symmetric"),
        )


# What compressed-tensors calls the tensors of a matrix.
_PACKED = {
    "qweight": "weight_packed", "scales": "weight_scale",
    "qzeros": "weight_zero_point", "g_idx": "weight_g_idx",
}  # fmt: skip
# Part of an expert -> its place; the first of each pair of families is Qwen's and DeepSeek's name.
_PARTS = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up",
    "w1": "gate", "w3": "up", "w2": "down",
}  # fmt: skip
_EXPERT = re.compile(
    r"(?P<prefix>(?:.*\.)?layers\.(?P<layer>\d+)\.(?:mlp|block_sparse_moe|feed_forward)\.experts)\."
    rf"(?P<expert>\d+)\.(?P<part>{'|'.join(_PARTS)})\.(?P<tensor>\w+)"
)


@dataclass(frozen=True)
class Linear:
    """One quantised matrix: the name before ``.qweight``, and its sizes."""

    name: str
    k: int
    n: int
    packed: bool  # pack_quantized

    def tensor(self, kind: str) -> str:
        """The full name of its qweight, scales, qzeros or g_idx."""
        return f"{self.name}.{_PACKED[kind] if self.packed else kind}"

    @property
    def qweight(self) -> str:
        return self.tensor("qweight")


class _Layer:
    """The quantised experts of one layer, by name."""

    def __init__(self, checkpoint: Checkpoint, layer: int) -> None:
        self.checkpoint = checkpoint
        self.quantization = Quantization.of(checkpoint)
        names: dict[tuple[int, str], str] = {}
        prefixes = set()
        for name in checkpoint.tensors:
            found = _EXPERT.fullmatch(name)
            if found is None or int(found["layer"]) != layer:
                continue
            prefixes.add(found["prefix"])
            names[int(found["expert"]), _PARTS[found["part"]]] = name.rpartition(".")[0]
        if not names:
            raise _wrong(
                f"layer {layer}",
                "expert tensors, layers.N.mlp.experts.E.gate_proj.qweight or alike",
                "none",
            )
        if len(prefixes) > 1:
            raise _wrong(f"layer {layer}", "one set of experts", ", ".join(sorted(prefixes)))
        self.num_experts = self._count(max(e for e, _ in names) + 1)
        self.fused = (0, "gate_up") in names
        parts = ("gate_up", "down") if self.fused else ("gate", "up", "down")
        prefix = prefixes.pop()
        style = {part: spelling for spelling, part in reversed(_PARTS.items())}
        for (_, part), name in names.items():
            style[part] = name.rpartition(".")[2]
        self.linears = {
            part: [self._linear(f"{prefix}.{e}.{style[part]}") for e in range(self.num_experts)]
            for part in parts
        }
        for part, linears in self.linears.items():
            for linear in linears:
                if (linear.k, linear.n) != (linears[0].k, linears[0].n):
                    raise _wrong(
                        f"tensor '{linear.qweight}'",
                        f"[K, N] = [{linears[0].k}, {linears[0].n}] as in expert 0's {part}",
                        [linear.k, linear.n],
                    )
        self._check_sizes()

    def _count(self, seen: int) -> int:
        config = self.checkpoint.json("config.json") or {}
        config = config.get("text_config") or config
        for key in ("num_experts", "num_local_experts", "n_routed_experts"):
            count = config.get(key)
            if count is None:
                continue
            if not isinstance(count, int) or count < 1 or seen > count:
                raise _wrong(
                    f"config.json {key}", f"at least the {seen} experts that are there", count
                )
            return count
        return seen

    def _linear(self, name: str) -> Linear:
        form = self.quantization.format
        linear = Linear(name, 0, 0, form == "pack_quantized")
        entry = self.checkpoint.entry(linear.qweight)
        if len(entry.shape) != 2 or 0 in entry.shape:
            raise _wrong(f"tensor '{linear.qweight}' shape", "two sizes", list(entry.shape))
        rows, cols = entry.shape
        if form == "awq":
            return replace(linear, k=rows, n=cols * 8)
        if form == "pack_quantized":
            self._check_shape(f"{name}.weight_shape", rows, cols * 8)
            return replace(linear, k=cols * 8, n=rows)
        return replace(linear, k=rows * 8, n=cols)

    def _check_shape(self, name: str, rows: int, cols: int) -> None:
        """A tensor [2] that says N and K once more, where there is one."""
        if name not in self.checkpoint.tensors:
            return
        shape = self.checkpoint.read(name, ("I64", "I32"), (2,)).tolist()
        if shape != [rows, cols]:
            raise _wrong(f"tensor {name!r}", str([rows, cols]), shape)

    def _check_sizes(self) -> None:
        down = self.linears["down"][0]
        if self.fused:
            gate_up = self.linears["gate_up"][0]
            expected = (down.n, 2 * down.k)
            if (gate_up.k, gate_up.n) != expected:
                raise _wrong(
                    f"tensor '{gate_up.qweight}'",
                    f"[H, 2I] = {list(expected)}, as down says",
                    [gate_up.k, gate_up.n],
                )
            return
        for part in ("gate", "up"):
            linear = self.linears[part][0]
            if (linear.k, linear.n) != (down.n, down.k):
                raise _wrong(
                    f"tensor '{linear.qweight}'",
                    f"[H, I] = {[down.n, down.k]}, as down says",
                    [linear.k, linear.n],
                )

    def groups(self, linear: Linear) -> int:
        size = self.quantization.group_size
        return 1 if size == -1 else -(-linear.k // size)

    def g_idx(self, linear: Linear) -> Array | None:
        """The group of each column; None where the columns are in order."""
        name = linear.tensor("g_idx")
        if name not in self.checkpoint.tensors or self.quantization.format == "awq":
            if self.quantization.act_order:
                raise _wrong(f"tensor {name!r}", "to be there, as desc_act says", "no such tensor")
            return None
        values = self.checkpoint.read(name, ("I32",), (linear.k,))
        groups = self.groups(linear)
        outside = (values < 0) | (values >= groups)
        if outside.any():
            at = int(outside.argmax())
            raise _wrong(f"tensor {name!r} [{at}]", f"a group of 0 to {groups - 1}", values[at])
        size = linear.k if self.quantization.group_size == -1 else self.quantization.group_size
        if np.array_equal(values, np.arange(linear.k, dtype=np.int32) // size):
            return None
        if self.quantization.act_order is False:
            raise _wrong(
                f"tensor {name!r}", "k // group_size, as desc_act=false says", "another order"
            )
        return values

    def stack(
        self, parts: tuple[str, ...], step: Callable[[str], None]
    ) -> "_core.MarlinExpertStack":
        """The Marlin stack of some parts of all experts, columns one after another."""
        first = self.linears[parts[0]][0]
        orders = []
        for e in range(self.num_experts):
            found = [self.g_idx(self.linears[part][e]) for part in parts]
            for part, order in zip(parts[1:], found[1:], strict=True):
                same = order is found[0] or (
                    order is not None and found[0] is not None and np.array_equal(order, found[0])
                )
                if not same:
                    raise _wrong(
                        f"tensor '{self.linears[part][e].tensor('g_idx')}'",
                        f"the order of '{self.linears[parts[0]][e].tensor('g_idx')}'",
                        "another one",
                    )
            orders.append(found[0])
        g_idx = None
        if any(order is not None for order in orders):
            size = first.k if self.quantization.group_size == -1 else self.quantization.group_size
            plain = np.arange(first.k, dtype=np.int32) // size
            rows = [plain if order is None else order for order in orders]
            same = all(np.array_equal(row, rows[0]) for row in rows)
            g_idx = rows[0] if same else np.stack(rows)
        scale_types = {
            self.checkpoint.entry(linear.tensor("scales")).dtype
            for part in parts
            for linear in self.linears[part]
        }
        builder = _core.MarlinStackBuilder(
            self.num_experts,
            first.k,
            sum(self.linears[part][0].n for part in parts),
            self.quantization.group_size,
            self.quantization.format,
            f32_scales=scale_types != {"F16"},
            zeros=self.quantization.symmetric is not True,
            g_idx=g_idx,
        )
        for e in range(self.num_experts):
            first_col = 0
            for part in parts:
                linear = self.linears[part][e]
                self._add(builder, e, first_col, linear)
                first_col += linear.n
                step(linear.name)
        return builder.build()

    def _add(
        self, builder: "_core.MarlinStackBuilder", expert: int, first_col: int, linear: Linear
    ) -> None:
        read, groups = self.checkpoint.read, self.groups(linear)
        form, n_words = self.quantization.format, -(-linear.n // 8)
        shape, scales, zeros = (linear.k // 8, linear.n), (groups, linear.n), (groups, n_words)
        if form == "awq":
            shape = (linear.k, n_words)
        if form == "pack_quantized":
            shape, scales, zeros = (linear.n, linear.k // 8), scales[::-1], zeros[::-1]
        qzeros = None
        # GPTQ always has zero points; the others have none where they are symmetric.
        symmetric = self.quantization.symmetric
        optional = symmetric is True if form == "awq" else symmetric is not False
        optional &= form in ("awq", "pack_quantized")
        if not optional or linear.tensor("qzeros") in self.checkpoint.tensors:
            qzeros = read(linear.tensor("qzeros"), ("I32",), zeros)
        bias = f"{linear.name}.bias"
        if bias in self.checkpoint.tensors and np.any(
            read(bias, ("F16", "BF16", "F32"), (linear.n,))
        ):
            raise _core.UnsupportedError(
                f"load_from_safetensors: tensor {bias!r}: expected no bias, got values other than 0"
            )
        builder.add(
            expert,
            first_col,
            read(linear.qweight, ("I32",), shape),
            read(linear.tensor("scales"), ("F16", "BF16", "F32"), scales),
            qzeros,
            linear.name,
        )

    def bytes(self, parts: tuple[str, ...]) -> Iterator[tuple[str, int]]:
        for part in parts:
            for linear in self.linears[part]:
                entry = self.checkpoint.entry(linear.qweight)
                yield linear.name, entry.end - entry.begin


def load_marlin_stacks(
    path: str | Path, layer: int, progress: Callable[[str, int, int], None] | None = None
) -> "tuple[_core.MarlinExpertStack, _core.MarlinExpertStack]":
    """The gate_up and down stacks of one layer.

    ``progress(name, done_bytes, total_bytes)`` is called after each matrix. Raises FormatError
    naming the tensor that is missing or does not fit.
    """
    source = _Layer(Checkpoint(path), layer)
    gate_up = ("gate_up",) if source.fused else ("gate", "up")
    sizes = dict(source.bytes((*gate_up, "down")))
    total, done = sum(sizes.values()), 0

    def step(name: str) -> None:
        nonlocal done
        done += sizes[name]
        if progress is not None:
            progress(name, done, total)

    return source.stack(gate_up, step), source.stack(("down",), step)
