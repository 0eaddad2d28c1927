"""What a checkpoint's configuration says of its INT4 tensors."""

from dataclasses import dataclass
from typing import Any, Literal

from moesaic import _core
from moesaic.safetensors.reader import Checkpoint, unsupported, wrong


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

    def four_bits(self, *names: str) -> None:
        bits = self.get(int, *names)
        if bits != 4:
            raise wrong(f"{self.source} {names[0]}", "4", bits)

    def group_size(self, *names: str) -> int:
        size = self.get(int, *names)
        if size is None:
            return 128
        if size != -1 and not 1 <= size < 1 << 31:
            raise wrong(f"{self.source} {names[0]}", "-1 or a positive number", size)
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
            raise wrong(
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
            raise wrong(f"{fields.source} config_groups weights", "an object", weights)
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
