"""Random layers and calls: routing and results against the model in f64 of tests/python/oracle.py,
and the promises about bits.

A case draws a layer (sizes, weight types, router, activation, shared and latent experts, norms, a
table by token id, biases), an input, and a way to route it; then it makes some of the checks.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import harness
import numpy as np
from harness import Board, Finding, Fuzzer
from oracle import (
    ExpertsF64,
    LayerF64,
    router_scores,
    router_weights,
    selection_fault,
)

import moesaic as mo
from moesaic import _core

TYPES = mo.testing.quant_types()
DECODED = [n for n, f in TYPES.items() if f["decodes"] and n not in ("F64", "INT4")]
PLAIN = [n for n in DECODED if TYPES[n]["block_elems"] == 1]
KINDS = [
    *("swiglu", "swiglu_clamp_input", "swiglu_clamp_output", "swiglu_oai", "geglu_tanh", "reglu"),
    *("gelu_tanh", "relu_squared", "situ"),
]
#: Widths that are whole numbers of steps and records of the kernels, and some beside them.
WIDTHS = [1, 2, 3, 5, 7, 8, 15, 16, 17, 24, 31, 32, 33, 40, 48, 63, 64, 65, 96, 100, 127, 129, 160]
EXPERTS = [1, 2, 3, 4, 5, 7, 8, 8, 16, 16, 17, 31, 33, 64, 65, 129, 256, 300]
TOKENS = [0, 1, 1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 64, 65, 100, 130]

#: Relative to the sizes of what is summed up. They are wide because a clamped activation jumps from
#: end to end where its gate passes zero: a gate known to 1 % moves 1 % of the values by their whole
#: size, which is 10 % of the norm. A column or an expert in the wrong place moves more.
BOUNDS = {"cpu": 2e-5, "exact": 1e-2, "fast": 0.4}
#: Half a unit in the last place of the types of y.
ROUNDING = {"float32": 0.0, "float16": 2.0**-11}


class Draw:
    """Random choices of one case."""

    def __init__(self, random: np.random.Generator):
        self.random = random

    def pick(self, *options):
        return options[self.random.integers(len(options))]

    def chance(self, probability: float) -> bool:
        return bool(self.random.random() < probability)

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return self.random.standard_normal(shape, np.float32) * np.float32(scale)

    def near_one(self, size: int) -> np.ndarray:
        return 1 + self.normal(size, scale=0.1)

    def f32(self, *options: float) -> float:
        return float(np.float32(self.pick(*options)))

    def width(self, *types: str) -> int:
        """A number of columns that the blocks of these types divide."""
        block = max(TYPES[t]["block_elems"] for t in types)
        if block == 1:
            return int(self.pick(*WIDTHS))
        return block * int(self.pick(*((1, 1, 2, 3, 5) if block <= 64 else (1, 1, 2))))

    def role(self, experts: int, rows: int, cols: int, kind: str):
        """A role as ``from_encoded`` takes it, and its values [E, rows, cols] in f64."""
        facts = TYPES[kind]
        if facts["encodes"]:
            values = self.normal(experts, rows, cols, scale=cols**-0.5)
            data = mo.testing.quantize(values, kind)
        else:
            size = cols // facts["block_elems"] * facts["block_bytes"]
            # The upper bits of the scales in f16 would make infinities of random bytes.
            data = self.random.integers(0, 64, (experts, rows, size), np.uint8)
        decoded = mo.testing.dequantize(data, kind, (experts, rows, cols)).astype(np.float64)
        return (data, kind, (experts, rows, cols)), decoded

    def activation(self) -> mo.Activation:
        return mo.Activation(
            self.pick(*KINDS) if self.chance(0.7) else "swiglu",
            limit=self.f32(7.0, 0.5, 2.0),
            alpha=self.f32(1.702, 1.0, -0.5),
            beta=self.f32(1.0, 4.0, 0.5),
            linear_beta=self.f32(0.0, 25.0, 2.0),
        )

    def experts(self, count: int, hidden: int, width: int, types, activation: mo.Activation):
        """Encoded gate, up and down, and the same in f64."""
        encoded, decoded = [], []
        shapes = ((width, hidden), (width, hidden), (hidden, width))
        for role, (kind, (rows, cols)) in enumerate(zip(types, shapes, strict=True)):
            if role == 0 and not activation.gated:
                encoded.append(None)
                decoded.append(None)
                continue
            one, values = self.role(count, rows, cols, kind)
            encoded.append(one)
            decoded.append(values)
        return encoded, ExpertsF64(activation, *decoded)

    def router(self, experts: int, identity: int, top_k: int) -> mo.RouterConfig:
        count = experts + identity
        groups = used = 1
        divisors = [d for d in range(2, min(count, 17)) if count % d == 0]
        if divisors and self.chance(0.3):
            groups = int(self.pick(*divisors))
            used = int(self.random.integers(1, groups + 1))
            used = max(used, -(-top_k * groups // count))
        guard = self.pick("none", "add_eps", "clamp_min")

        def bias(scale: float) -> list[float]:
            return self.normal(count, scale=scale).tolist() if self.chance(0.3) else []

        return mo.RouterConfig(
            count,
            top_k,
            score=self.pick("softmax", "softmax", "softmax_selected", "sigmoid", "sqrt_softplus"),
            renormalize=self.chance(0.6),
            guard=guard,
            guard_eps=0.0 if guard == "none" else self.f32(1e-20, 1e-6, 0.1),
            scale=self.f32(1.0, 1.0, 2.5, 0.0),
            select_on=self.pick("scores", "scores", "scores", "scores", "logits", "given"),
            num_groups=groups,
            groups_used=used,
            group_reduce=self.pick("top2_sum", "max"),
            group_mask=self.pick("minus_infinity", "zero"),
            weight_on=self.pick("output", "output", "output", "input"),
            identity_experts=identity,
            router_bias=bias(1.0),
            selection_bias=bias(0.3),
        )


def with_epilogues(draw: Draw, encoded, experts: ExpertsF64) -> mo.ExpertStack:
    """A stack with scales and biases, which only files have: through the door of checkpoints."""
    count, width, hidden = experts.up.shape
    specs = {
        role: None if one is None else (one[1], "made", "copied", "drawn")
        for role, one in zip(("gate", "up", "down"), encoded, strict=True)
    }
    builder = _core.StackBuilder(count, hidden, width, **specs)
    for role, one in zip(("gate", "up", "down"), encoded, strict=True):
        if one is None:
            continue
        values = getattr(experts, role)
        scale = draw.near_one(count) if draw.chance(0.5) else np.ones(count, np.float32)
        if draw.chance(0.7):
            experts.bias[role] = draw.normal(count, values.shape[1], scale=0.3).astype(np.float64)
        for e in range(count):
            bias = experts.bias[role][e].astype(np.float32) if role in experts.bias else None
            builder.add(role, e, np.ascontiguousarray(one[0][e]), float(scale[e]), bias)
        setattr(experts, role, values * scale.astype(np.float64)[:, None, None])
    with mock.patch("moesaic.safetensors.gather_experts", lambda *_, **__: builder):
        return mo.ExpertStack.load_from_safetensors("drawn", 0)


@dataclass
class Call:
    """A layer and a call of it."""

    layer: mo.MoeLayer
    model: LayerF64
    x: np.ndarray
    isa: str | None
    #: What the call brings for each token.
    logits: np.ndarray | None = None
    by_token: dict[str, np.ndarray] = field(default_factory=dict)
    routing: tuple[np.ndarray, np.ndarray] | None = None
    #: The layer's experts by token id.
    table: np.ndarray | None = None

    def __call__(self, tuning=None, rows=slice(None), x=None, **more) -> Any:
        keywords: dict[str, Any] = {name: a[rows] for name, a in self.by_token.items()}
        if self.routing is not None:
            keywords["routing"] = mo.Routing(*(np.ascontiguousarray(a[rows]) for a in self.routing))
        logits = None if self.logits is None else self.logits[rows]
        with mo.tuning(**{"cpu_isa": self.isa, **(tuning or {})}):
            return self.layer(self.x[rows] if x is None else x, logits, **keywords, **more)


def draw_call(draw: Draw, board: Board) -> Call:
    """A layer, and a call that fits it."""
    activation = draw.activation()
    same = draw.pick(*DECODED)
    types = draw.pick([draw.pick(*PLAIN) for _ in range(3)], [same, same, draw.pick(*DECODED)])
    if draw.chance(0.4):
        types = [draw.pick(*DECODED) for _ in range(3)]
    is_latent = draw.chance(0.15)
    inner, width = draw.width(*types[:2]), draw.width(types[2])
    count, limit = int(draw.pick(*EXPERTS)), int(draw.pick(30_000, 30_000, 300_000))
    while count > 1 and count * inner * width * 3 > limit:
        count //= 2
    top_k = int(min(count, draw.pick(1, 1, 2, 2, 3, 4, 6, 8, count if count <= 40 else 8)))
    tokens = int(draw.pick(*TOKENS))
    while tokens > 1 and tokens * top_k * inner * width * 3 > 1_000_000:
        tokens //= 2
    hidden = int(draw.pick(1, 3, 8, 17, 32, 64, 96)) if is_latent else inner
    identity = 0 if is_latent else int(draw.pick(0, 0, 0, 1, 3))
    layout = draw.pick("auto", "auto", "file")
    board.say(
        f"{activation!r} experts {count} + {identity}, H {hidden}, inner {inner}, I {width}, "
        f"types {types}, top_k {top_k}, tokens {tokens}, layout {layout}"
    )

    encoded, experts = draw.experts(count, inner, width, types, activation)
    has_epilogues = draw.chance(0.2)
    if has_epilogues:
        stack = with_epilogues(draw, encoded, experts)
    else:
        stack = mo.ExpertStack.from_encoded(*encoded, layout=layout)
    router = draw.router(count, identity, top_k)

    parts: dict[str, Any] = {}
    model_parts: dict[str, Any] = {}
    facts: dict[str, Any] = {"shared": draw.pick("none", "none", "plain", "sigmoid_gated")}
    if facts["shared"] != "none":
        kind = mo.Activation(draw.pick("swiglu", "geglu_tanh", "relu_squared", "reglu"))
        fits = [t for t in DECODED if hidden % TYPES[t]["block_elems"] == 0]
        shared_types = [draw.pick(*fits)] * 2 + [draw.pick(*DECODED)]
        shared_width = draw.width(shared_types[2])
        encoded, shared = draw.experts(1, hidden, shared_width, shared_types, kind)
        parts["shared"] = mo.ExpertStack.from_encoded(*encoded, layout=draw.pick("auto", "file"))
        model_parts["shared"] = shared
        facts |= {"shared_intermediate_size": shared_width, "shared_activation": kind}
        facts["shared_scale"] = draw.f32(1.0, 1.0, 0.5)
        if facts["shared"] == "sigmoid_gated":
            parts["shared_gate"] = draw.normal(hidden, scale=hidden**-0.5)
    if is_latent:
        kind = draw.pick(np.float32, np.float16)
        parts["latent"] = (
            draw.normal(inner, hidden, scale=hidden**-0.5).astype(kind),
            draw.normal(hidden, inner, scale=inner**-0.5).astype(kind),
        )
        model_parts["latent"] = tuple(a.astype(np.float64) for a in parts["latent"])
        facts |= {"latent_size": inner, "latent_norm": draw.chance(0.5)}
        if facts["latent_norm"]:
            parts["latent_norm"] = draw.near_one(inner)
    facts["input_norm"] = draw.chance(0.2)
    if facts["input_norm"]:
        parts["input_norm"] = draw.near_one(hidden)
    facts["router_input"] = draw.pick("experts", "experts", "experts", "norm", "separate")
    if facts["router_input"] == "norm":
        parts["router_norm"] = draw.near_one(hidden)
    given = router.select_on == "given"
    if given and draw.chance(0.5):
        facts["vocab_size"] = 11
        lowest = -1 if draw.chance(0.3) else 0
        table = draw.random.integers(lowest, router.num_experts, (11, top_k), np.int32)
        parts["token_experts"] = table
    config = mo.MoeConfig(
        hidden, width, count, top_k, activation=activation, router=router,
        norm_eps=draw.f32(1e-6, 1e-5, 0.1), **facts,
    )  # fmt: skip
    weight = draw.normal(router.num_experts, hidden, scale=2 * hidden**-0.5)
    layer = mo.MoeLayer(stack, config, weight, **parts)
    for name in ("shared_gate", "latent_norm", "input_norm", "router_norm"):
        if name in parts:
            model_parts[name] = parts[name].astype(np.float64)
    model = LayerF64(config, experts, weight.astype(np.float64), **model_parts)

    scale = 1.0 if has_epilogues else draw.pick(1.0, 1.0, 1.0, 1e-4, 30.0)
    # Weights of random bits are larger than trained ones; products should not be.
    scale /= max(1.0, float(np.sqrt((experts.up**2).mean() * inner)))
    x = draw.normal(tokens, hidden, scale=scale)
    call = Call(layer, model, x, draw.pick(None, None, None, "scalar", "avx2"))
    call.table = parts.get("token_experts")
    if draw.chance(0.2):
        call.x = x.astype(np.float16)
    ways = draw.pick("own", "own", "logits", "routing")
    if ways == "routing":
        slots = int(draw.pick(top_k, top_k, max(1, top_k - 1), top_k + 1))
        lowest = -1 if draw.chance(0.4) else 0
        ids = draw.random.integers(lowest, router.num_experts, (tokens, slots), np.int32)
        if draw.chance(0.2):
            ids[:] = draw.random.integers(0, router.num_experts)
        call.routing = ids, draw.normal(tokens, slots)
    else:
        if ways == "logits":
            call.logits = draw.normal(tokens, router.num_experts, scale=draw.pick(1, 3))
        elif facts["router_input"] == "separate":
            call.by_token["router_input"] = draw.normal(tokens, hidden)
        if given:
            ints = draw.pick(np.int32, np.int64)
            if "token_experts" in parts and draw.chance(0.7):
                call.by_token["token_ids"] = draw.random.integers(0, 11, tokens, ints)
            else:
                lowest = -1 if draw.chance(0.3) else 0
                shape = (tokens, top_k)
                ids = draw.random.integers(lowest, router.num_experts, shape, ints)
                call.by_token["topk_ids"] = ids
    biases = [len(router.router_bias) > 0, len(router.selection_bias) > 0]
    short = config.replace(router=router.replace(router_bias=[], selection_bias=[]))
    board.say(
        f"{short!r}, biases {biases}, types {types}, {layout}, epilogues {has_epilogues}, "
        f"{tokens} tokens, {ways}, x {call.x.dtype} * {scale}, isa {call.isa}"
    )
    return call


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def expect(condition: object, what: str) -> None:
    if not condition:
        raise Finding(what)


@dataclass
class Checks:
    """What is checked of one call."""

    draw: Draw
    call: Call
    worst: dict[str, float]
    y: np.ndarray = field(init=False)
    ids: np.ndarray = field(init=False)
    want: np.ndarray = field(init=False)
    size: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.y, routing = self.call({"precision": "exact"}, return_routing=True)
        self.ids = np.asarray(routing.topk_ids)
        weights = np.asarray(routing.topk_weights, np.float64)
        self._routing(self.ids, weights)
        with np.errstate(all="ignore"):
            self.want, self.size = self.call.model(self.call.x, self.ids, weights)

    def _routing(self, ids: np.ndarray, weights: np.ndarray) -> None:
        call, config = self.call, self.call.model.config
        router = config.router
        if call.routing is not None:
            expect(np.array_equal(ids, call.routing[0]), "ids of a routing changed")
            expect(np.array_equal(weights, call.routing[1]), "weights of a routing changed")
            return
        if call.logits is not None:
            logits = call.logits.astype(np.float64)
        else:
            logits = call.model.logits(call.x, call.by_token.get("router_input"))
        if len(router.router_bias):
            logits = logits + np.asarray(router.router_bias)
        if not len(logits):
            return
        if router.select_on == "given":
            if "token_ids" in call.by_token:
                want_ids = call.table[call.by_token["token_ids"]]
                expect(np.array_equal(ids, want_ids), "ids of the table")
            else:
                expect(np.array_equal(ids, call.by_token["topk_ids"]), "given ids changed")
        elif (fault := selection_fault(router, logits, ids)) is not None:
            raise Finding(f"selection: {fault}")
        want = router_weights(router, logits, ids)
        # Scores so small that f32 has no digits for them.
        there = np.where(
            ids >= 0, np.take_along_axis(router_scores(router, logits), np.maximum(ids, 0), 1), 0
        )
        tiny = (router.score != "softmax_selected") & (there.sum(1) < 1e-30)
        wrong = ~np.isclose(weights, want, rtol=3e-4, atol=1e-6)[~tiny]
        expect(not wrong.any(), f"router weights differ by {np.abs(weights - want).max()}")

    def near(self, name: str, got: np.ndarray) -> None:
        """A result beside the model; ``name`` is also the bound's."""
        call = self.call
        expect(got.shape == call.x.shape, f"{name}: shape {got.shape}")
        expect(got.dtype == call.x.dtype, f"{name}: dtype {got.dtype}")
        want, size, y = self.want, self.size, got.astype(np.float64)
        if call.x.dtype == np.float16:
            # Rows with values that f16 has not, or only with a few bits.
            known = (size < 30000).all(1, keepdims=True) & (size > 1e-3)
            want, size, y = (np.where(known, a, 0) for a in (want, size, y))
        with np.errstate(all="ignore"):
            error = np.linalg.norm(y - want) / max(np.linalg.norm(size), 1e-30)
        error = np.inf if np.isnan(error) else float(error)
        if call.x.dtype == np.float32:
            self.worst[name] = max(self.worst.get(name, 0.0), error)
        bound = BOUNDS[name] + ROUNDING[str(call.x.dtype)]
        expect(error <= bound, f"{name}: error of {error:.3g} is above {bound}")

    def tuning(self) -> dict[str, Any]:
        """A way through the forward."""
        way = self.draw.pick(
            {}, {"gemm": "bucketed"}, {"gemm": "aligned", "row_space": "token_pairs"},
            {"gemm": "aligned", "row_space": "packed_rows"},
        )  # fmt: skip
        if way.get("gemm") == "aligned":
            way = {**way, "block_size": int(self.draw.pick(8, 16, 32, 48, 64))}
        return {**way, "precision": self.draw.pick("exact", "fast"), "poison": True}

    # Each method below is one check.

    def reference(self) -> None:
        self.near("exact", self.y)
        if "token_ids" in self.call.by_token or self.call.routing is None:
            _, routing = self.call(return_routing=True)
        else:
            routing = mo.Routing(*self.call.routing)
        self.near("cpu", mo.moe_forward_cpu(self.call.x, routing, self.call.layer))

    def paths_and_threads(self) -> None:
        """Every way is near, and its bits do not depend on threads."""
        for _ in range(2):
            way, threads = self.tuning(), self.draw.random.permutation([1, 2, 3, 7])[:2]
            first, second = (self.call({**way, "threads": int(n)}) for n in threads)
            self.near(way["precision"], first)
            expect(same_bits(first, second), f"{way}: {threads} threads differ")

    def batches(self) -> None:
        """With batch_invariant a token's bits do not depend on the others."""
        tokens = len(self.call.x)
        way = {
            "batch_invariant": True, "precision": self.draw.pick("auto", "exact", "fast"),
            "gemm": self.draw.pick("auto", "bucketed", "aligned"),
        }  # fmt: skip
        whole = self.call(way)
        cuts = sorted({0, tokens, *self.draw.random.integers(0, tokens + 1, 2).tolist()})
        parts = [self.call(way, rows=slice(a, b)) for a, b in itertools.pairwise(cuts)]
        if parts:
            expect(same_bits(whole, np.concatenate(parts)), f"{way}: batches at {cuts} differ")

    def outputs(self) -> None:
        """``out``, ``workspace`` and ``accumulate``."""
        exact, call = {"precision": "exact"}, self.call
        slots = call.routing[0].shape[1] if call.routing is not None else call.model.config.top_k
        more = {}
        if slots <= call.model.config.top_k:
            more["workspace"] = mo.Workspace.for_layer(call.layer, max(len(call.x), 1))
        out = np.full(call.x.shape, np.nan, np.float32)
        got = call(exact, out=out, **more)
        expect(got is out, "out was not returned")
        if call.x.dtype == np.float32:
            expect(same_bits(out, self.y), "out= gives other bits than a new array")
        strided = np.full((2 * len(out), out.shape[1] + 3), np.nan, np.float32)
        call(exact, out=strided[::2, : out.shape[1]])
        expect(same_bits(np.ascontiguousarray(strided[::2, : out.shape[1]]), out), "strided out=")
        strided[::2, : out.shape[1]] = np.nan
        expect(np.isnan(strided).all(), "something between the rows of out= was written")
        start = self.draw.normal(*out.shape)
        added = start.copy()
        call(exact, out=added, accumulate=True)
        room = 1e-5 * (1 + np.abs(out).max(initial=0))
        expect(np.allclose(added, start + out, rtol=1e-4, atol=room), "accumulate")

    def strides(self) -> None:
        call, exact = self.call, {"precision": "exact"}
        tokens, hidden = call.x.shape
        wide = np.zeros((2 * tokens, hidden + 3), call.x.dtype)
        wide[::2, :hidden] = call.x
        expect(same_bits(call(exact, x=wide[::2, :hidden]), self.y), "x with strides")
        turned = np.ascontiguousarray(call.x[::-1])[::-1]
        expect(same_bits(call(exact, x=turned), self.y), "x in reverse")
        columns = np.asfortranarray(call.x)
        expect(same_bits(call(exact, x=columns), self.y), "x by columns")

    def nonfinite(self) -> None:
        """A row without meaning leaves the others as they are."""
        call = self.call
        # The own router would send a changed row elsewhere, and with it how the others are laid
        # out; so would the weights.
        if len(call.x) < 2 or (call.routing is None and call.logits is None):
            return
        row = int(self.draw.random.integers(len(call.x)))
        bad = call.x.copy()
        column = int(self.draw.random.integers(call.x.shape[1]))
        bad[row, column] = self.draw.pick(np.nan, np.inf, -np.inf)
        way = self.tuning()
        others = np.arange(len(bad)) != row
        with np.errstate(all="ignore"):
            before, after = call(way), call(way, x=bad)
        expect(same_bits(before[others], after[others]), f"{way}: row {row} changes others")

    def functions(self) -> None:
        """The functions that take a layer give what the layer gives."""
        call = self.call
        if call.by_token or call.model.config.router_input == "separate":
            return
        keywords = {} if call.routing is None else {"routing": mo.Routing(*call.routing)}
        arguments = (call.x, call.logits, call.layer)
        with mo.tuning(cpu_isa=call.isa, precision="exact"):
            got = mo.moe_forward(*arguments, **keywords)
            expect(same_bits(got, self.y), "moe_forward")
            self.near("exact", mo.moe_forward_bucketed(
                *arguments, gemm=self.draw.pick("auto", "bucketed", "aligned"),
                row_space=self.draw.pick("auto", "token_pairs", "packed_rows"), **keywords,
            ))  # fmt: skip


CHECKS = [
    *(Checks.reference, Checks.paths_and_threads, Checks.batches, Checks.outputs),
    *(Checks.strides, Checks.nonfinite, Checks.functions),
]


class Forward(Fuzzer):
    megabytes = 4096  # threads reserve much that they never touch

    def start(self) -> None:
        self.worst: dict[str, float] = {}

    def case(self, random: np.random.Generator, board: Board) -> str:
        draw = Draw(random)
        call = draw_call(draw, board)
        checks = Checks(draw, call, self.worst)
        for i in random.permutation(len(CHECKS))[:2]:
            CHECKS[i](checks)
        return "agreed"

    def summary(self) -> dict[str, float]:
        return {f"largest error {name}": error for name, error in self.worst.items()}


if __name__ == "__main__":
    harness.main(Forward(), __doc__)
