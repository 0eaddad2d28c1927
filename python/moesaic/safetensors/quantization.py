"""What a checkpoint's configuration says of its quantised matrices, one by one."""

from dataclasses import dataclass
from typing import Any, Literal

from moesaic import _core
from moesaic.safetensors.reader import Checkpoint, unsupported, wrong
from moesaic.safetensors.targets import dynamic_rule, named_rule, rank

Format = Literal["gptq", "gptq_v2", "awq", "awq_gemv", "pack_quantized"]


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
                raise wrong(f"{self.source} {name}", kind.__name__, repr(value))
            return value
        return None

    def unsupported(self, name: str, expected: str, got: object) -> _core.UnsupportedError:
        return unsupported(f"{self.source} {name}", expected, repr(got))

    def bits(self, *names: str) -> int:
        bits = self.get(int, *names)
        if bits is None or not 2 <= bits <= 8:
            raise wrong(f"{self.source} {names[0]}", "2 to 8", bits)
        return int(bits)

    def group_size(self, *names: str) -> int:
        size = self.get(int, *names)
        if size is None:
            return 128
        if size != -1 and not 1 <= size < 1 << 31:
            raise wrong(f"{self.source} {names[0]}", "-1 or a positive number", size)
        return int(size)

    def with_rule(self, name: str, rule: Any) -> "_Fields":
        """These fields with those of a rule for some matrices in their place."""
        if not isinstance(rule, dict):
            raise wrong(f"{self.source} {name}", "an object", repr(rule))
        return _Fields(f"{self.source} {name}", self.fields | rule)


@dataclass(frozen=True)
class IntScheme:
    """How one matrix is stored as integers; None where the configuration does not say."""

    format: Format
    bits: int
    group_size: int  # -1: one group per row
    act_order: bool | None
    symmetric: bool | None


class Quantization:
    """The configuration of a checkpoint, or that there is none."""

    def __init__(self, folder: str, source: str, config: dict[str, Any] | None) -> None:
        self._folder = folder
        self._fields = None if config is None else _Fields(source, config)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Quantization":
        model = checkpoint.json("config.json") or {}
        source, config = "config.json", None
        inner = (model.get(name) for name in ("text_config", "language_config", "llm_config"))
        for place in (model, *(one for one in inner if isinstance(one, dict))):
            for name in ("quantization_config", "compression_config"):
                config = place.get(name) if config is None else config
        for name in ("quantize_config.json", "quant_config.json"):
            if config is None:
                source, config = name, checkpoint.json(name)
        good = config if isinstance(config, dict) else None
        return cls(str(checkpoint.folder), source, good)

    @property
    def said(self) -> dict[str, Any] | None:
        """The fields of the configuration, as they are there."""
        return None if self._fields is None else self._fields.fields

    def _known(self, base: str) -> _Fields:
        if self._fields is None:
            raise wrong(
                f"{self._folder}: integers of {base!r}",
                "quantize_config.json, or quantization_config in config.json",
                "neither",
            )
        return self._fields

    def ints(self, base: str) -> IntScheme:
        """Raises FormatError or UnsupportedError for what is wrong or unknown."""
        fields = self._known(base)
        method = fields.get(str, "quant_method", "method") or (
            "awq" if "w_bit" in fields.fields else "gptq"
        )
        if method == "compressed-tensors":
            return _compressed_tensors(self._group(fields, base))
        if method not in ("gptq", "awq", "auto-round", "auto_round", "intel/auto-round"):
            raise fields.unsupported(
                "quant_method", "gptq, awq, auto-round or compressed-tensors", method
            )
        form = method
        if method not in ("gptq", "awq"):
            form = _auto_round_format(fields)
        fields = _with_rules(fields, base)
        return _awq(fields) if form == "awq" else _gptq(fields, form)

    def block(self, base: str) -> tuple[int, int] | None:
        """Rows and columns of one scale of an FP8 matrix, where they are configured."""
        if self._fields is None:
            return None
        fields, name = self._fields, "weight_block_size"
        size = fields.fields.get(name)
        if size is None and "config_groups" in fields.fields:
            group = self._group(fields, base, required=False)
            weights = group.get(dict, "weights") if group is not None else None
            if weights is None:
                return None
            name, size = "block_structure", weights.get("block_structure")
            if weights.get("strategy") == "group":
                size = [1, weights.get("group_size")]
            if isinstance(size, str):  # "128x128"
                size = [int(part) if part.isdigit() else part for part in size.split("x")]
        if size is None:
            return None
        good = isinstance(size, list) and len(size) == 2
        if not good or not all(type(v) is int and v > 0 for v in size):
            raise wrong(f"{fields.source} {name}", "two sizes", size)
        return size[0], size[1]

    @staticmethod
    def _group(fields: _Fields, base: str, required: bool = True) -> Any:
        """The one of compressed-tensors' ``config_groups`` whose targets name the matrix."""
        groups = fields.get(dict, "config_groups") or {}
        schemes = [(name, g) for name, g in groups.items() if isinstance(g, dict)]
        found = []
        for name, group in schemes:
            where = f"{fields.source} config_groups {name}"
            targets = group.get("targets") or ["Linear"]
            if not isinstance(targets, list):
                raise wrong(f"{where} targets", "a list of names", repr(targets))
            closeness = rank(targets, base, where)
            if closeness is not None:
                found.append((closeness, name, group))
        if not found and len(schemes) == 1:
            found = [(0, *schemes[0])]
        closest = min((closeness for closeness, _, _ in found), default=0)
        best = [(name, group) for closeness, name, group in found if closeness == closest]
        if len(best) != 1:
            if not required:
                return None
            raise fields.unsupported(
                "config_groups", f"one with {base!r} as its target", [name for name, _ in best]
            )
        name, group = best[0]
        merged = {"format": fields.get(str, "format")} | {
            key: value for key, value in group.items() if value is not None
        }
        return _Fields(f"{fields.source} config_groups {name}", merged)


def _with_rules(fields: _Fields, base: str) -> _Fields:
    """The fields for one matrix."""
    for name, rule_of in (("dynamic", dynamic_rule), ("extra_config", named_rule)):
        rules = fields.get(dict, name) or {}
        rule = rule_of(rules, base, f"{fields.source} {name}")
        if rule is False:
            raise wrong(f"{fields.source} {name}", f"floats for {base!r}", "integers")
        if rule is not None:
            fields = fields.with_rule(name, rule)
    return fields


def _auto_round_format(fields: _Fields) -> str:
    form = fields.get(str, "packing_format") or "auto_round:auto_gptq"
    known = {"auto_round:auto_gptq": "gptq", "auto_round:gptq": "gptq", "auto_gptq": "gptq",
             "auto_round:auto_awq": "awq", "auto_round:awq": "awq", "auto_awq": "awq"}  # fmt: skip
    if form in known:
        return known[form]
    # AutoRound's own kernels read the zero points as they are.
    if form == "auto_round" or form.startswith("auto_round:triton"):
        return "gptq_v2"
    raise fields.unsupported("packing_format", " or ".join(known), form)


def _ints_only(fields: _Fields, name: str) -> None:
    kind = fields.get(str, name) or "int"
    if kind != "int":
        raise fields.unsupported(name, "int", kind)


def _gptq(fields: _Fields, form: str) -> IntScheme:
    _ints_only(fields, "data_type")
    if form == "gptq":
        form = fields.get(str, "checkpoint_format", "format") or "gptq"
    facts = (
        fields.bits("bits"),
        fields.group_size("group_size"),
        fields.get(bool, "desc_act"),
        fields.get(bool, "sym"),
    )
    if form == "gptq":
        return IntScheme("gptq", *facts)
    if form == "gptq_v2":
        return IntScheme("gptq_v2", *facts)
    raise fields.unsupported("checkpoint_format", "gptq or gptq_v2", form)


def _awq(fields: _Fields) -> IntScheme:
    _ints_only(fields, "data_type")
    version = (fields.get(str, "version", "checkpoint_format") or "gemm").lower()
    if version not in ("gemm", "awq", "gemv"):
        raise fields.unsupported("version", "gemm or gemv", version)
    bits = fields.bits("bits", "w_bit")
    if bits != 4:
        raise fields.unsupported("bits", "4, the only ones that AWQ has", bits)
    zero_point = fields.get(bool, "zero_point")
    symmetric = fields.get(bool, "sym") if zero_point is None else not zero_point
    group_size = fields.group_size("group_size", "q_group_size")
    form: Format = "awq_gemv" if version == "gemv" else "awq"
    return IntScheme(form, bits, group_size, False, symmetric)


def _compressed_tensors(group: _Fields) -> IntScheme:
    form = group.get(str, "format")
    if form != "pack-quantized":
        raise group.unsupported("format", "pack-quantized", form)
    weights = group.get(dict, "weights")
    if weights is None:
        raise wrong(f"{group.source} weights", "an object", weights)
    scheme = _Fields(f"{group.source} weights", weights)
    bits = scheme.bits("num_bits")
    _ints_only(scheme, "type")
    strategy = scheme.get(str, "strategy") or "group"
    if strategy not in ("group", "channel"):
        raise scheme.unsupported("strategy", "group or channel", strategy)
    order = scheme.get(str, "actorder")
    return IntScheme(
        "pack_quantized",
        bits,
        -1 if strategy == "channel" else scheme.group_size("group_size"),
        True if order in ("group", "dynamic") else None,
        scheme.get(bool, "symmetric"),
    )
