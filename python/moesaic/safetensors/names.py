"""Which tensors of a checkpoint are the experts of a layer."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from moesaic._files import shown
from moesaic.safetensors.reader import Checkpoint, unsupported, wrong

#: Part of a name -> the roles whose rows it holds, in order.
PARTS = {
    "gate_proj": ("gate",), "up_proj": ("up",), "down_proj": ("down",),
    "gate_up_proj": ("gate", "up"),
    "w1": ("gate",), "w3": ("up",), "w2": ("down",),
    "input_linear": ("gate", "up"), "output_linear": ("down",), "linear_gate": ("gate",),
}  # fmt: skip

# What follows the base of a matrix: nothing, its values, its scales, its order.
_SUFFIXES = (
    r"\.(?:weight|bias|scale|weight_scale(?:_inv|_2)?|weight_global_scale|weight_packed|weight_shape"
    r"|weight_zero_point|weight_g_idx|qweight|qzeros|scales|g_idx|input_scale|input_global_scale)"
    r"|_(?:blocks|scales|bias|scale|scale_inv)"
)
_NAME = re.compile(rf"(?P<base>.*?)(?P<suffix>{_SUFFIXES})?")
_BLOCK = (
    r"(?P<stem>(?:.*\.)?layers\.(?P<layer>\d+)\.)"
    r"(?:(?P<block>mlp|block_sparse_moe|feed_forward|ffn|mixer)\.)?"
)
_ONE = re.compile(rf"{_BLOCK}experts\.(?P<expert>\d+)\.(?P<part>{'|'.join(PARTS)})")
_ALL = re.compile(
    rf"{_BLOCK}(?:experts\.(?P<part>gate_up_proj|gate_proj|up_proj|down_proj)"
    r"|(?P<linear>input_linear|output_linear))"
)

#: More than any model has; a number above is a damaged file.
_MAX_EXPERTS = 1 << 16


@dataclass(frozen=True)
class Matrix:
    """One matrix of one expert by name; ``base`` stands before ``.weight``, ``_blocks`` ..."""

    base: str
    roles: tuple[str, ...]
    index: int | None = None  # of the first dimension, where one tensor holds all experts


#: Every expert's matrix, by the roles it holds: ("gate", "up") and ("down",), or three of one.
Matrices = dict[tuple[str, ...], list[Matrix]]


@dataclass(frozen=True)
class Block:
    """The MoE block of one layer."""

    stem: str  # "model.layers.3."
    name: str  # "model.layers.3.mlp"; "model.layers.3" where experts are parts of the layer itself
    matrices: Matrices

    def owns(self, name: str) -> bool:
        """Whether a tensor is of the block and of nothing else in the layer."""
        if f"{self.name}." == self.stem:
            return name.startswith((f"{self.stem}experts.", f"{self.stem}router."))
        return name.startswith(f"{self.name}.")

    @property
    def num_experts(self) -> int:
        return len(self.matrices["down",])


def _base(name: str) -> str:
    found = _NAME.fullmatch(name)
    assert found is not None
    return found["base"]


def _count(checkpoint: Checkpoint, seen: int) -> int:
    """The number of experts: as config.json says, else as many as there are."""
    config = checkpoint.json("config.json") or {}
    config = config.get("text_config") or config
    for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        count = config.get(key)
        if count is None or isinstance(count, list):
            continue
        if type(count) is not int or not max(seen, 1) <= count <= _MAX_EXPERTS:
            raise wrong(
                f"config.json {key}",
                f"at least the {seen} experts that are there",
                shown(count),
            )
        return count
    if seen > _MAX_EXPERTS:
        raise wrong("experts", f"at most {_MAX_EXPERTS}", seen)
    return seen


def find_block(checkpoint: Checkpoint, layer: int) -> Block:
    """The experts of ``layer``, one tensor each or all in one.

    Raises FormatError when there are none, or two sets of them.
    """
    one: dict[tuple[int, tuple[str, ...]], str] = {}
    every: dict[tuple[str, ...], str] = {}
    blocks = set()
    for name in checkpoint.tensors:
        base = _base(name)
        found = _ONE.fullmatch(base) or _ALL.fullmatch(base)
        if found is None or int(found["layer"]) != layer:
            continue
        blocks.add((found["stem"], found["block"] or ""))
        facts = found.groupdict()
        roles = PARTS[facts["part"] or facts["linear"]]
        if "expert" in facts:
            one[int(facts["expert"]), roles] = base
        else:
            every[roles] = base
    if not blocks:
        raise wrong(
            f"layer {layer}",
            "expert tensors, layers.N.mlp.experts.E.gate_proj.weight or alike",
            "none",
        )
    if len(blocks) > 1 or (one and every):
        names = sorted(stem + block for stem, block in blocks)
        raise wrong(f"layer {layer}", "one set of experts", ", ".join(names))
    stem, block = blocks.pop()
    matrices = _all_in_one(checkpoint, every) if every else _one_by_one(checkpoint, one)
    return Block(stem, (stem + block).rstrip("."), matrices)


def _one_by_one(checkpoint: Checkpoint, names: dict[tuple[int, tuple[str, ...]], str]) -> Matrices:
    count = _count(checkpoint, max(e for e, _ in names) + 1)
    if count > len(checkpoint.tensors):  # before anything is made for each of them
        there = {e for e, _ in names}
        missing = next(e for e in range(count) if e not in there)
        some = next(iter(names.values()))
        raise wrong(
            f"experts of '{some}'", f"{count} of them", f"{len(there)}, of which {missing} is none"
        )
    # The spelling of the experts that are there names those that are missing.
    spelling = {roles: base for (_, roles), base in names.items()}
    matrices: Matrices = {}
    for roles in _complete(spelling):
        base, _, part = spelling[roles].rpartition(".")
        prefix = base.rpartition(".")[0]
        matrices[roles] = [Matrix(f"{prefix}.{e}.{part}", roles) for e in range(count)]
    return matrices


def _all_in_one(checkpoint: Checkpoint, names: dict[tuple[str, ...], str]) -> Matrices:
    matrices: Matrices = {}
    for roles in _complete(names):
        base = names[roles]
        name = next(
            name
            for name in (base, *(base + suffix for suffix in (".weight", "_blocks", "_scales")))
            if name in checkpoint.tensors
        )
        shape = checkpoint.entry(name).shape
        if len(shape) < 3 or 0 in shape:
            raise wrong(f"tensor {name!r} shape", "[E, rows, columns]", list(shape))
        if matrices and shape[0] != len(next(iter(matrices.values()))):
            raise wrong(
                f"tensor {name!r} shape",
                f"{len(next(iter(matrices.values())))} experts as the others have",
                list(shape),
            )
        count = _count(checkpoint, shape[0])
        if count != shape[0]:
            raise wrong(f"tensor {name!r} shape", f"{count} experts", list(shape))
        matrices[roles] = [Matrix(base, roles, e) for e in range(count)]
    return matrices


def _complete(names: dict[tuple[str, ...], str]) -> tuple[tuple[str, ...], ...]:
    """The role groups of whole experts: all that is there, and what must be there with it."""
    some = next(iter(names.values()))
    if ("gate", "up") in names:
        groups: tuple[tuple[str, ...], ...] = (("gate", "up"), ("down",))
    else:
        groups = ((("gate",),) if ("gate",) in names else ()) + (("up",), ("down",))
    for roles in groups:
        if roles not in names:
            raise wrong(f"experts of '{some}'", f"a matrix for {roles[0]}", "none")
    for roles, base in names.items():
        if roles not in groups:
            raise wrong(f"tensor '{base}'", "gate and up either fused or apart", "both")
    return groups


def find_dense(checkpoint: Checkpoint, prefixes: Iterable[str]) -> Matrices | None:
    """The matrices of a plain feed-forward network under one of ``prefixes``, or None."""
    for prefix in prefixes:
        names = {}
        for name in checkpoint.tensors:
            base = _base(name)
            start, _, part = base.rpartition(".")
            if start == prefix and part in PARTS:
                names[PARTS[part]] = base
        if names:
            return {roles: [Matrix(names[roles], roles)] for roles in _complete(names)}
    return None


def check_all_used(checkpoint: Checkpoint, block: Block, used: set[str]) -> None:
    """Raises UnsupportedError for a tensor of the block whose name or base is not in ``used``."""
    for name in checkpoint.tensors:
        if block.owns(name) and name not in used and _base(name) not in used:
            raise unsupported(f"tensor {name!r}", "a tensor with a place in this layer", "another")
