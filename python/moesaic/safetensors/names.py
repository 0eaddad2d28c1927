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

# Whatever follows the base of a matrix is a tensor of it: values, scales, orders, biases.
_REST = r"(?:[._].*)?"
_BLOCK = (
    r"(?P<stem>(?:.*\.)?layers\.(?P<layer>\d+)\.)"
    r"(?:(?P<block>mlp|block_sparse_moe|feed_forward|ffn|mixer)\.)?"
)
_PART = rf"(?P<part>{'|'.join(PARTS)})"
#: One expert's matrix; ModelOpt puts the expert behind the part.
_ONE = (
    re.compile(rf"(?P<base>{_BLOCK}experts\.(?P<expert>\d+)\.{_PART}){_REST}"),
    re.compile(rf"(?P<base>{_BLOCK}experts\.{_PART}s?\.(?P<expert>\d+)){_REST}"),
)
_ALL = re.compile(
    rf"(?P<base>{_BLOCK}(?:experts\.(?P<part>gate_up_proj|gate_proj|up_proj|down_proj)"
    rf"|(?P<linear>input_linear|output_linear))){_REST}"
)
#: Scales of activations, which products with unrounded activations do not need, and sizes that
#: the tensors themselves have.
_HARMLESS = re.compile(
    r".*[._](?:input_scale(?:_inv|_ub)?|input_global_scale|input_zero_point|activation_scale"
    r"|output_scale|output_zero_point|(?:weight_)?shape)"
)
#: Part of the router that one model keeps among its experts.
_OF_ROUTER = "e_score_correction_bias"

#: More than any model has; a number above is a damaged file.
_MAX_EXPERTS = 1 << 16


@dataclass(frozen=True)
class Matrix:
    """One matrix of one expert by name; ``base`` stands before ``.weight``, ``_blocks`` ..."""

    base: str
    roles: tuple[str, ...]
    index: int | None = None  # of the first dimension, where one tensor holds all experts
    experts: int = 1  # of the first dimension


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


def find(checkpoint: Checkpoint, base: str, *kinds: str) -> str | None:
    """The tensor of a matrix that is of the first of these kinds, under any of its spellings."""
    for kind in kinds:
        for start in (f"{base}.weight_", f"{base}.", f"{base}_weight_", f"{base}_"):
            if start + kind in checkpoint.tensors:
                return start + kind
    return None


def values_name(checkpoint: Checkpoint, base: str) -> str | None:
    """The tensor with the values of a matrix, in whatever form; None when there is none."""
    for name in (f"{base}.weight", base):
        if name in checkpoint.tensors:
            return name
    return find(checkpoint, base, "packed", "qweight", "blocks")


def _count(checkpoint: Checkpoint, seen: int) -> int:
    """The number of experts: as config.json says, else as many as there are."""
    config = checkpoint.json("config.json") or {}
    for name in ("text_config", "language_config", "llm_config"):
        inner = config.get(name)
        config = inner if isinstance(inner, dict) and inner else config
    for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        count = config.get(key)
        if count is None or isinstance(count, list):
            continue
        if not isinstance(count, int) or count < 1 or seen > count:
            there = f"at least the {seen} experts that are there"
            raise wrong(f"config.json {key}", there, shown(count))
        return count
    return seen


def find_block(checkpoint: Checkpoint, layer: int) -> Block:
    """The experts of ``layer``, one tensor each or all in one.

    Raises FormatError when there are none, or two sets of them.
    """
    one: dict[tuple[int, tuple[str, ...]], str] = {}
    templates: dict[tuple[str, ...], tuple[str, str]] = {}
    every: dict[tuple[str, ...], str] = {}
    blocks = set()
    for name in checkpoint.tensors:
        found = _match(name) if f"layers.{layer}." in name else None
        if found is None or int(found["layer"]) != layer:
            continue
        blocks.add((found["stem"], found["block"] or ""))
        facts, base = found.groupdict(), found["base"]
        roles = PARTS[facts["part"] or facts["linear"]]
        if "expert" in facts:
            one[int(facts["expert"]), roles] = base
            # The spelling of the experts that are there names those that are missing.
            templates[roles] = (name[: found.start("expert")], base[found.end("expert") :])
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
    if every:
        matrices = _all_in_one(checkpoint, every)
    else:
        matrices = _one_by_one(checkpoint, {e for e, _ in one}, templates)
    return Block(stem, (stem + block).rstrip("."), matrices)


def _match(name: str) -> "re.Match[str] | None":
    found = (pattern.fullmatch(name) for pattern in (*_ONE, _ALL))
    return next(filter(None, found), None)


def _one_by_one(
    checkpoint: Checkpoint, seen: set[int], templates: dict[tuple[str, ...], tuple[str, str]]
) -> Matrices:
    count = _count(checkpoint, max(seen) + 1)
    spelling = {roles: "0".join(parts) for roles, parts in templates.items()}
    groups = _complete(spelling)
    # Before anything is made for each of them: numbers may be claimed that no file has.
    missing = next(e for e in range(len(seen) + 1) if e not in seen)
    if missing < count:
        name = str(missing).join(templates[groups[0]])
        raise wrong(f"tensor '{name}.weight'", f"to be there, as {count} experts", "no such tensor")
    return {
        roles: [Matrix(str(e).join(templates[roles]), roles) for e in range(count)]
        for roles in groups
    }


def _all_in_one(checkpoint: Checkpoint, names: dict[tuple[str, ...], str]) -> Matrices:
    matrices: Matrices = {}
    for roles in _complete(names):
        base = names[roles]
        name = values_name(checkpoint, base)
        if name is None:
            some = next(name for name in checkpoint.tensors if name.startswith(base))
            raise wrong(
                f"tensor {some!r}", f"values beside it, {base!r} or '{base}_packed'", "none"
            )
        shape = checkpoint.entry(name).shape
        if len(shape) < 3 or 0 in shape or shape[0] > _MAX_EXPERTS:
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
        matrices[roles] = [Matrix(base, roles, e, count) for e in range(count)]
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
        pattern = re.compile(rf"(?P<base>{re.escape(prefix)}\.{_PART}){_REST}")
        names = {}
        for name in checkpoint.tensors:
            found = pattern.fullmatch(name)
            if found is not None:
                names[PARTS[found["part"]]] = found["base"]
        if names:
            return {roles: [Matrix(names[roles], roles)] for roles in _complete(names)}
    return None


def check_all_used(checkpoint: Checkpoint, names: Iterable[str], used: set[str]) -> None:
    """Raises UnsupportedError for one of ``names`` that nothing read and that means something."""
    for name in names:
        if name not in used and _HARMLESS.fullmatch(name) is None:
            raise unsupported(
                f"tensor {name!r}", "a tensor with a place in this layer", "one that is not read"
            )


def names_of_experts(checkpoint: Checkpoint, block: Block) -> list[str]:
    """The tensors of the experts of ``block``, without those of its router."""
    start = f"{block.name}."
    found = []
    for name in checkpoint.tensors:
        if not name.startswith(start) or name.endswith(_OF_ROUTER):
            continue
        if name.startswith(f"{start}experts.") or _match(name) is not None:
            found.append(name)
    return found
