"""``moesaic generate MODEL "prompt"``: text of a whole model, its speed, and its experts' use.

The text is the result and goes to stdout as it comes; what was measured goes to stderr behind it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import moesaic as mo
from moesaic._errors import error_of

from .options import add_json, add_model, integer, memory, number, output
from .table import pairs, size
from .whole import DTYPES, model_of, place_of, quiet, require_packages, tokenizer_of

if TYPE_CHECKING:
    from ..transformers.pooled import Reads
    from ..transformers.timed import Timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("prompt", help="text to go on from; - reads it from stdin")
    parser.add_argument(
        "--max-tokens", type=integer(1), default=128, metavar="N", help="new tokens at most"
    )
    parser.add_argument(
        "--temperature",
        type=number(0),
        default=0.0,
        help="of sampling (default: 0, the likeliest token each time)",
    )
    parser.add_argument(
        "--top-p", type=number(0, 1, above=True), help="sample from the likeliest part of this size"
    )
    parser.add_argument("--seed", type=integer(0), default=0, help="of sampling")
    parser.add_argument(
        "--chat", action="store_true", help="the prompt is a message: use the tokenizer's template"
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="a folder or GGUF file with it (default: the model's)"
    )
    parser.add_argument(
        "--dense",
        choices=["keep", *DTYPES],
        help="of a GGUF file, what becomes of matrices outside of experts (default: keep)",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), help="of activations and other tensors")
    parser.add_argument(
        "--gate-up-type", metavar="TYPE", help="of a folder, encode gate and up, as in Q4_K"
    )
    parser.add_argument("--down-type", metavar="TYPE", help="of a folder, encode down")
    parser.add_argument("--memory", type=memory, help="what experts take at most, as in 12GiB")
    parser.add_argument(
        "--weight-cache",
        metavar="FOLDER",
        help="where repacked weights are kept for later starts; 'beside' the model",
    )
    parser.add_argument("--threads", type=integer(1, 4096), help="of torch and of the experts")
    parser.add_argument(
        "--usage", metavar="FILE", type=output, help="write how often each expert was used, as .npz"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    require_packages("generate", "torch", "transformers")
    place = place_of(options.file)
    _check_options(options, place.gguf)
    import torch

    import moesaic.transformers as mt
    from moesaic.transformers.pooled import reads_of
    from moesaic.transformers.timed import generate_timed

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with quiet():
        tokenizer = tokenizer_of(place, options.tokenizer)
        inputs = _prompt(tokenizer, options)
        start = time.perf_counter()
        model = model_of(
            place,
            dense=options.dense or "keep",
            dtype=options.dtype,
            gate_up=options.gate_up_type,
            down=options.down_type,
            memory=options.memory,
            weight_cache=_weight_cache(options.weight_cache),
        )
        load = time.perf_counter() - start
        torch.manual_seed(options.seed)
        timed = generate_timed(
            model, tokenizer, inputs, (lambda text: None) if options.json else _show,
            max_new_tokens=options.max_tokens, **_sampling(options),
        )  # fmt: skip
    profile, reads = mt.usage(model), reads_of(model)
    if options.usage is not None:
        profile.save(options.usage)
    if options.json:
        print(json.dumps(facts(timed, profile, reads, load, options.file), indent=2))
        return 0
    print(flush=True)
    print(pairs(report(timed, profile, reads, load)), file=sys.stderr)
    return 0


def _check_options(options: argparse.Namespace, gguf: bool) -> None:
    """Raises ConfigError for options of the other kind of model, or of another way to run it."""
    types = ("gate_up_type", "down_type")
    for name in types if gguf else ("dense",):
        if getattr(options, name) is not None:
            raise _wrong(
                name,
                "a checkpoint folder" if gguf else "a GGUF file",
                "a GGUF file, whose experts stay as they are" if gguf else "a checkpoint folder",
            )
    for name in types:
        if options.memory is not None and getattr(options, name) is not None:
            raise _wrong(
                name, "experts that are all in memory", "--memory, which reads them as stored",
                "moesaic convert writes a file with other types",
            )  # fmt: skip
    if options.top_p is not None and options.temperature == 0:
        raise _wrong("top_p", "a --temperature above 0", "0")


def _wrong(option: str, expected: str, got: str, hint: str = "") -> mo.ConfigError:
    name = f"--{option.replace('_', '-')}"
    return error_of(mo.ConfigError, "generate", name, expected, got, hint)


def _weight_cache(option: str | None) -> bool | str:
    """What ``from_gguf`` and ``from_pretrained`` take."""
    return option == "beside" if option in (None, "beside") else option


def _prompt(tokenizer: Any, options: argparse.Namespace) -> Any:
    """int64 [1, T]."""
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    if options.chat:
        if tokenizer.chat_template is None:
            raise error_of(
                mo.UnsupportedError, "generate", "--chat", "a tokenizer with a template",
                "one without", "without --chat the model goes on from the text as it is",
            )  # fmt: skip
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True,
            return_tensors="pt", return_dict=True,
        )["input_ids"]  # fmt: skip
    else:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if ids.shape[-1] == 0:
        raise error_of(mo.ShapeError, "generate", "prompt", "at least one token", "none")
    return ids.long()


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    if options.temperature == 0:
        # Those of the model's own configuration would be warned of.
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    sampled = {"do_sample": True, "temperature": options.temperature}
    return sampled if options.top_p is None else {**sampled, "top_p": options.top_p}


def _show(text: str) -> None:
    print(text, end="", flush=True)


def report(
    timed: Timed, profile: mo.ExpertProfile, reads: Reads | None, load: float
) -> list[tuple[str, str]]:
    """Rows of names and words: the load, the prompt, the new tokens, the experts, their reads."""
    rate = "" if timed.rate is None else f", {timed.rate:.1f} tokens/s"
    spread = profile.effective_experts()
    least, most = int(spread.argmin()), int(spread.argmax())
    layers, experts = profile.counts.shape
    used = f"{layers} layers of {experts}, effective {spread.mean():.1f}"
    if layers > 1:
        used += (
            f" ({spread[least]:.1f} in layer {profile.layer_indices[least]} to"
            f" {spread[most]:.1f} in layer {profile.layer_indices[most]})"
        )
    rows = [
        ("load", f"{load:.1f} s"),
        (
            "prompt",
            f"{timed.prompt_tokens} tokens in {timed.prompt_seconds:.2f} s,"
            f" {timed.prompt_rate:.1f} tokens/s",
        ),
        ("text", f"{timed.new_tokens} tokens{rate}"),
        ("experts", used),
    ]
    if reads is not None:
        room = str(reads.most)
        if reads.fewest < reads.most:
            room = f"{reads.fewest} to {reads.most}"
        rows.append((
            "memory",
            f"{room} of {reads.num_experts} experts a layer, {reads.hit_rate:.1%} of what tokens"
            f" asked for was there; {size(reads.read_bytes)} read",
        ))  # fmt: skip
    return rows


def facts(
    timed: Timed, profile: mo.ExpertProfile, reads: Reads | None, load: float, path: str
) -> dict[str, Any]:
    """The JSON form."""
    spread = profile.effective_experts()
    return {
        "path": path,
        "text": timed.text,
        "load_s": load,
        "prompt": {
            "tokens": timed.prompt_tokens,
            "seconds": timed.prompt_seconds,
            "tokens_per_s": timed.prompt_rate,
        },
        "new": {
            "tokens": timed.new_tokens,
            "seconds": timed.seconds,
            "tokens_per_s": timed.rate,
        },
        "memory": None if reads is None else asdict(reads),
        "layers": [
            {
                "layer": int(layer),
                "pairs": int(counts.sum()),
                "experts": int((counts > 0).sum()),
                "effective_experts": float(one),
            }
            for layer, counts, one in zip(
                profile.layer_indices, profile.counts, spread, strict=True
            )
        ],
    }
