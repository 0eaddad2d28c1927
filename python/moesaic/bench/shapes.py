"""Layer shapes of models people run, and the token counts measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BenchShape:
    """One MoE layer: sizes, and the quant types its files usually carry (INT4: GPTQ g128)."""

    name: str
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    gate_up_type: str = "Q4_K"
    down_type: str = "Q6_K"

    @property
    def macs_per_pair(self) -> int:
        """Multiply-adds of one token in one expert."""
        return 3 * self.hidden * self.intermediate


SHAPES: dict[str, BenchShape] = {
    shape.name: shape
    for shape in (
        BenchShape("qwen3-30b-a3b", 2048, 768, 128, 8),
        BenchShape("qwen3.6-35b-a3b", 2048, 512, 256, 8),
        BenchShape("mixtral-8x7b", 4096, 14336, 8, 2),
        BenchShape("olmoe", 2048, 1024, 64, 8),
        BenchShape("gpt-oss-20b", 2880, 2880, 32, 4, "MXFP4", "MXFP4"),
        BenchShape("qwen3-30b-a3b-gptq", 2048, 768, 128, 8, "INT4", "INT4"),
    )
}

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
