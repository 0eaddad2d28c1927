"""Whole models of one GGUF file in several engines: a token, a prompt, bytes.

Rounds alternate the engines, another one first in each. Time is that of a forward alone: no engine
picks words or decodes them.
"""

from __future__ import annotations

import datetime
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import moesaic as mo
import moesaic.transformers as mt
from moesaic.torch import Embedding, Experts, Linear
from moesaic.transformers.layouts import is_experts

from .peers.base import PeerUnavailable
from .peers.llama_cpp import LlamaCpp
from .run import machine

MIB = 1 << 20
#: Engines that are not ours, by their names for ``--peers``.
PEERS = ("torch-eager", "torch-grouped-mm", "llama.cpp")


@dataclass(frozen=True)
class WholeOptions:
    """What is measured."""

    threads: int
    peers: tuple[str, ...] = PEERS
    prompt: int = 512
    new: int = 16  # tokens that each round decodes behind the prompt
    rounds: int = 5


class Engine(ABC):
    """A model in one engine, and the milliseconds that it took."""

    name: str

    def __init__(self) -> None:
        self.decode_ms: list[float] = []
        self.prefill_ms: list[float] = []

    @abstractmethod
    def start(self, ids: list[int]) -> None:
        """Run a prompt from the beginning."""

    @abstractmethod
    def step(self, token: int) -> None:
        """Run one more token."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of its weights."""

    def round(self, prompt: Sequence[int], more: Sequence[int]) -> None:
        self.prefill_ms.append(_milliseconds(lambda: self.start(list(prompt))))
        self.decode_ms += [_milliseconds(partial(self.step, token)) for token in more]

    def forget(self) -> None:
        """Start measuring anew: the first calls make what later ones find."""
        self.decode_ms.clear()
        self.prefill_ms.clear()

    def result(self) -> dict[str, Any]:
        return {
            "engine": self.name,
            "decode_ms": quartiles(self.decode_ms),
            "prefill_ms": quartiles(self.prefill_ms),
            "mib": self.nbytes / MIB,
        }


class TorchEngine(Engine):
    """A model of transformers."""

    def __init__(self, name: str, model: Any, implementation: str | None = None) -> None:
        super().__init__()
        self.name, self.model, self.implementation = name, model, implementation
        self._cache: Any = None

    def start(self, ids: list[int]) -> None:
        if self.implementation is not None:  # engines share a model that differs in this alone
            self.model.set_experts_implementation(self.implementation)
        with torch.inference_mode():
            self._cache = self.model(torch.tensor([ids]), logits_to_keep=1).past_key_values

    def step(self, token: int) -> None:
        with torch.inference_mode():
            self.model(torch.tensor([[token]]), past_key_values=self._cache)

    @property
    def nbytes(self) -> int:
        ours = (Experts, Linear, Embedding)
        torch_s: list[int] = [p.numel() * p.element_size() for p in self.model.parameters()]
        here: list[int] = [
            module.nbytes for module in self.model.modules() if isinstance(module, ours)
        ]
        return sum(torch_s) + sum(here)


class LlamaEngine(Engine):
    """llama.cpp, which maps the file and repacks some of it."""

    name = "llama.cpp"

    def __init__(self, path: Path, options: WholeOptions) -> None:
        super().__init__()
        self.llama = LlamaCpp(path, options.prompt + options.new + 1, options.threads)
        self._nbytes = path.stat().st_size

    def start(self, ids: list[int]) -> None:
        self.llama.clear()
        self.llama.evaluate(ids)

    def step(self, token: int) -> None:
        self.llama.evaluate([token])

    @property
    def nbytes(self) -> int:
        return self._nbytes


def run_whole(
    path: Path, options: WholeOptions, config: Any = None, model: str | None = None
) -> dict[str, Any]:
    """Measure the model of a file, and return what ``--json`` writes.

    ``config`` is its configuration; None: what transformers reads from the file. ``model`` is what
    the table calls it; None: the name of the file. Raises as ``from_gguf``.
    """
    torch.set_num_threads(options.threads)
    absent: dict[str, str] = {}
    engines, kept = _engines(path, options, config, absent)
    for name, reason in absent.items():
        print(f"absent: {name}: {reason}")
    words = kept.config.get_text_config().vocab_size
    rng = np.random.default_rng(0)

    def some(count: int) -> list[int]:
        return [int(token) for token in rng.integers(0, words, count)]

    for engine in engines:
        engine.round(some(options.prompt), some(2))
        engine.forget()
    load = []
    for number in range(options.rounds):
        turn = number % len(engines)
        prompt, more = some(options.prompt), some(options.new)
        for engine in engines[turn:] + engines[:turn]:
            engine.round(prompt, more)
        load.append(os.getloadavg()[0])
    return {
        "date": f"{datetime.date.today()}",
        "machine": machine()["cpu"],
        "isa": mo.backends()[0].detail,
        "threads": options.threads,
        "load": float(np.median(load)),
        "model": model or path.name,
        "layers": kept.config.get_text_config().num_hidden_layers,
        "prompt": options.prompt,
        "types": types_of(kept),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "engines": [engine.result() for engine in engines],
        "absent": absent,
    }


def _engines(
    path: Path, options: WholeOptions, config: Any, absent: dict[str, str]
) -> tuple[list[Engine], Any]:
    """Those of others first, ours last, and the model that keeps all matrices.

    Why one is absent goes to ``absent``.
    """
    ours = mt.from_gguf(path, torch.bfloat16, config=config)
    engines: list[Engine] = []
    if {"torch-eager", "torch-grouped-mm"} & set(options.peers):
        try:
            plain = in_torch(ours)
        except PeerUnavailable as error:
            absent["torch"] = str(error)
        else:
            engines += [
                TorchEngine(f"torch bf16, {kind}", plain, kind)
                for kind in ("eager", "grouped_mm")
                if f"torch-{kind.replace('_', '-')}" in options.peers
            ]
    if "llama.cpp" in options.peers:
        try:
            engines.append(LlamaEngine(path, options))
        except PeerUnavailable as error:
            absent["llama.cpp"] = str(error)
    engines.append(TorchEngine("experts here", ours))
    kept = mt.from_gguf(path, config=config)
    engines.append(TorchEngine("experts and matrices here", kept))
    return engines, kept


def in_torch(ours: Any) -> Any:
    """The model with its experts decoded to bf16, in torch."""
    config = type(ours.config).from_dict(
        {k: v for k, v in ours.config.to_dict().items() if k != "quantization_config"}
    )
    with torch.device("meta"):
        plain = type(ours)(config).to(torch.bfloat16)
    state = {k: v for k, v in ours.state_dict().items() if not k.endswith("_extra_state")}
    for name, module in list(plain.named_modules()):
        if is_experts(module):
            stack = ours.get_submodule(name).stack
            state |= {f"{name}.{k}": v for k, v in _decoded(stack, name).items()}
    plain.load_state_dict(state, strict=True, assign=True)
    plain.model.rotary_emb = ours.model.rotary_emb  # its buffers are in no state_dict
    return plain.eval()


def _decoded(stack: mo.ExpertStack, name: str) -> dict[str, torch.Tensor]:
    """gate_up_proj [E, 2I, H] and down_proj [E, H, I], expert by expert."""
    if stack.biases or not stack.gated:
        raise PeerUnavailable(f"{name} has other tensors than gate_up_proj and down_proj")
    sizes = (stack.num_experts, stack.hidden_size, stack.intermediate_size)
    gate_up = torch.empty(sizes[0], 2 * sizes[2], sizes[1], dtype=torch.bfloat16)
    down = torch.empty(sizes, dtype=torch.bfloat16)
    for expert in range(sizes[0]):
        for i, role in enumerate(("gate", "up")):
            rows = slice(i * sizes[2], (i + 1) * sizes[2])
            gate_up[expert, rows] = torch.from_numpy(stack.dequantize(role, expert))  # type: ignore[arg-type]
        down[expert] = torch.from_numpy(stack.dequantize("down", expert))
    return {"gate_up_proj": gate_up, "down_proj": down}


def types_of(model: Any) -> dict[str, str]:
    """The types of the first layer with experts, and of most matrices."""
    experts = next(m for m in model.modules() if isinstance(m, Experts))
    matrices = [m.matrix.quant for m in model.modules() if isinstance(m, Linear)]
    common = max(set(matrices), key=matrices.count) if matrices else "none"
    of_roles: dict[Any, str] = experts.stack.quants
    return {**of_roles, "matrices": common}


def quartiles(values: list[float]) -> list[float]:
    """The lower quartile, the median and the upper one."""
    return [float(q) for q in np.percentile(values, (25, 50, 75))]


def _milliseconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)
