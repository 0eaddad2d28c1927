"""Text that a model makes, and how long its tokens took."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers


@dataclass(frozen=True)
class Timed:
    """What a model said, and when."""

    text: str
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float  # up to the first new token
    seconds: float  # of the new tokens behind the first

    @property
    def prompt_rate(self) -> float:
        """Tokens of the prompt per second."""
        return self.prompt_tokens / self.prompt_seconds

    @property
    def rate(self) -> float | None:
        """New tokens per second; None where there is only one, which came with the prompt."""
        return (self.new_tokens - 1) / self.seconds if self.new_tokens > 1 else None


class _Clock(transformers.TextStreamer):
    """Notes when tokens come, and hands on text as soon as it is whole words."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.parts = show, [""]
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.parts.append(text)
        self.show(text)


def generate_timed(
    model: Any,
    tokenizer: Any,
    inputs: torch.Tensor,
    show: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Timed:
    """What a model makes of a prompt.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With ``generate``.
    tokenizer : transformers.PreTrainedTokenizerBase
        What decodes its tokens.
    inputs : int64 tensor [1, T]
        The prompt.
    show : callable
        Called with each piece of text.
    **options
        Of ``generate``.

    Returns
    -------
    Timed
    """
    clock = _Clock(tokenizer, show)
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    pad = tokenizer.pad_token_id
    if pad is None:  # unused in a batch of one, but asked for
        pad = ends[0] if isinstance(ends, list) else ends
    start = time.perf_counter()
    # The prompt comes as it goes in, so that its time is no token's.
    tokens = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), streamer=clock,
        **{"eos_token_id": ends, "pad_token_id": pad, **options},
    )  # fmt: skip
    first, last = clock.times[1], clock.times[-1]
    new = tokens.shape[1] - inputs.shape[1]
    return Timed("".join(clock.parts), inputs.shape[1], new, first - start, last - first)
