"""A model that does not fit in memory, by two names: ``open_store`` and ``store.layer``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias, get_args

from moesaic import _core
from moesaic._errors import error_of
from moesaic._sizes import bytes_of
from moesaic.offload import ExpertProfile

if TYPE_CHECKING:
    from moesaic.safetensors import CheckpointExperts

__all__ = ["OffloadStore", "open_store"]

OnMiss = Literal["compute", "stage", "error"]
#: What a store is made of, opened.
Source: TypeAlias = "_core.GgufFile | CheckpointExperts"

#: Experts on their way from the disk at most, where memory is not short.
_BUFFERS = 16
_LARGE_PAGE = 2 << 20
#: What of its score an expert keeps from one forward to the next: half after some 23 of them.
_DECAY = 0.97


def open_store(
    file: Source | str | PathLike[str],
    memory: int | str,
    *,
    prefix: str | None = None,
    max_tokens: int = 512,
    on_miss: OnMiss = "stage",
    profile: ExpertProfile | None = None,
    staging: int = 0,
    io_threads: int = 16,
    read_ahead: int = 4,
    direct_io: bool | None = None,
) -> OffloadStore:
    """Open a model whose experts need not fit in memory.

    The experts that are used most stay in memory, as many as fit, and change with use; the others
    are read from the file when a call needs them. Results are those of a layer with everything in
    memory, bit for bit.

    Parameters
    ----------
    file : GgufFile or path
        The model: a GGUF file, or a Hugging Face checkpoint (its folder, one .safetensors file, or
        an index file). A path is opened and stays open while the store lives.
    memory : int or str
        Bytes, or a text such as "12GiB", that experts, buffers of reads, the other parts of all
        layers and the workspace of one call take together at most. The interpreter and the rest
        of a model come on top.
    prefix : str, optional
        Of which part of a checkpoint, where several have experts, as in
        ``MoeLayer.from_safetensors``: 'thinker' or 'talker'. None: the model, without what drafts
        for it.
    max_tokens : int
        Tokens of the largest call, for whose workspace room is left. Larger calls work, and take
        more.
    on_miss : str
        What a call does with an expert that is not in memory: 'stage' it, so that it stays if it is
        used more than another, 'compute' it and let it go, or raise an 'error'.
    profile : ExpertProfile, optional
        What an earlier run used: its most used experts are read first, before this returns.
    staging, io_threads, read_ahead, direct_io
        As in ``MoeExpertStore.from_gguf`` and ``from_safetensors``.

    Returns
    -------
    OffloadStore

    Raises
    ------
    FileNotFoundError, OSError, FormatError
        The file is absent or cannot be read, or is no model, or has no experts under ``prefix``,
        or in several parts without one.
    ConfigError
        A ``prefix`` of a GGUF file; a ``memory`` that is no size, or too small for an expert of
        each layer, the buffers of reads, the other parts and the workspace (the message counts
        them); a bad option.
    UnsupportedError
        A checkpoint with experts in a form that is not read one by one (the message says which, and
        that ``moesaic convert`` makes a GGUF file of it).
    ShapeError
        A profile of another model.

    Examples
    --------
    >>> import moesaic as mo, numpy as np
    >>> _ = mo.testing.write_moe_gguf("model.gguf")  # a small model with random weights
    >>> store = mo.open_store("model.gguf", memory="16MiB")
    >>> with store.layer(0) as layer:
    ...     y = layer(np.ones((3, 256), np.float32))
    >>> y.shape
    (3, 256)
    """
    limit = bytes_of("open_store", "memory", memory)
    if on_miss not in get_args(OnMiss):
        raise error_of(
            _core.ConfigError, "open_store", "on_miss", " or ".join(get_args(OnMiss)),
            repr(on_miss)[:80],
        )  # fmt: skip
    source = opened(file, prefix)
    experts, budgets, beside = stored_experts(
        "open_store", source, limit, max_tokens,
        staging=staging, io_threads=io_threads, read_ahead=read_ahead, direct_io=direct_io,
    )  # fmt: skip
    pools = pools_of(experts, budgets)
    options = {
        "max_tokens": max_tokens, "on_miss": on_miss, "staging": staging,
        "io_threads": io_threads, "read_ahead": read_ahead, "direct_io": direct_io,
    }  # fmt: skip
    store = _store_of(experts, pools, beside, (source, limit, options))
    if profile is not None:
        profile.warm(pools)
        experts.apply(pools)
    return store


class OffloadStore:
    """A model whose experts need not fit in memory; ``open_store`` makes one.

    Thread safe. It pickles as how to open it, without what it has learnt.
    """

    _experts: _core.MoeExpertStore
    _pools: tuple[_core.ExpertPool, ...]
    #: Bytes of everything else.
    _beside: int
    #: The model, the memory in bytes and the options that ``open_store`` was called with.
    _origin: tuple[Source, int, dict[str, Any]]
    #: Where each block is in lists of layers.
    _places: dict[int, int]

    def __init__(self, *args: NoReturn, **kwargs: NoReturn) -> None:
        raise error_of(
            _core.ArgumentError, "OffloadStore", "arguments", "a store that open_store made",
            "a call of the class",
        )  # fmt: skip

    @property
    def blocks(self) -> list[int]:
        """Numbers of the blocks with experts."""
        return list(self._places)

    @property
    def experts(self) -> _core.MoeExpertStore:
        """The experts of all layers."""
        return self._experts

    @property
    def pools(self) -> tuple[_core.ExpertPool, ...]:
        """The pool of each layer: how many experts it keeps, which, and its statistics."""
        return self._pools

    @property
    def reading(self) -> str:
        """How experts are read: 'O_DIRECT', or 'page cache' with the reason."""
        return self._experts.reading

    def layer(
        self,
        block: int,
        *,
        config: _core.MoeConfig | None = None,
        top_k: int | None = None,
        precision: Literal["auto", "exact", "fast"] = "auto",
    ) -> _core.MoeLayer:
        """Return the layer of a block, ready to be called.

        Parameters
        ----------
        block : int
            Its number in the model, one of ``blocks``.
        config, top_k, precision
            As in ``MoeLayer.from_gguf`` and ``from_safetensors``.

        Returns
        -------
        MoeLayer

        Raises
        ------
        ShapeError
            A block without experts; the message lists those that have some.
        """
        pool = self._pools[self._places[block]] if block in self._places else None
        on_miss = self._origin[2]["on_miss"]
        return _core.MoeLayer.from_store(
            self._experts, block, pool, on_miss, config=config, top_k=top_k, precision=precision
        )

    def prefetch(self, block: int, ids: Any) -> None:
        """Say that a layer will soon need these experts, as predicted by the caller.

        Those that are not in memory begin to be read. Results do not depend on it.

        Parameters
        ----------
        block : int
            One of ``blocks``.
        ids : int array or sequence of int
            Experts, the likeliest first, any shape; negative ones are skipped.

        Raises
        ------
        ShapeError
            No such block, or an id that is no expert.
        """
        self._experts.prefetch(block, ids)

    def profile(self) -> ExpertProfile:
        """Return what the layers used so far: to be saved, and given to ``open_store`` again."""
        return self._experts.profile()

    def hit_rate(self) -> float:
        """Return the share of token-expert pairs whose expert was in memory; 1 before any call."""
        stats = [pool.stats for pool in self._pools]
        hits = sum(one.hit_pairs for one in stats)
        pairs = hits + sum(one.miss_pairs for one in stats)
        return hits / pairs if pairs else 1.0

    def memory(self) -> dict[str, int]:
        """Return bytes: slots in use, staging, other (parts and workspace), and the limit."""
        held = self._experts.memory()
        return {
            "slots": held["slots"] or 0,
            "staging": held["staging"] or 0,
            "other": self._beside,
            "limit": self._origin[1],
        }

    def io_stats(self) -> dict[str, int]:
        """Return what the reads from disk were; as ``MoeExpertStore.io_stats``."""
        return self._experts.io_stats()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, self._origin

    def __repr__(self) -> str:
        budgets = sorted({pool.budget for pool in self._pools})
        shown = f"{budgets[0]} to {budgets[-1]}" if len(budgets) > 1 else str(budgets[0])
        most = max(pool.num_experts for pool in self._pools)
        return (
            f"moesaic.OffloadStore(layers={len(self._pools)}, in memory {shown} of {most} experts"
            f" a layer, reading={self.reading!r})"
        )


def pools_of(experts: _core.MoeExpertStore, budgets: Sequence[int]) -> list[_core.ExpertPool]:
    """A pool for each layer of a store, which keep what is used and forget it slowly."""
    return [
        _core.ExpertPool(view.up.num_experts, budget, decay=_DECAY)
        for view, budget in zip(experts.layers, budgets, strict=True)
    ]


def _store_of(
    experts: _core.MoeExpertStore,
    pools: Sequence[_core.ExpertPool],
    beside: int,
    origin: tuple[Source, int, dict[str, Any]],
) -> OffloadStore:
    store = OffloadStore.__new__(OffloadStore)
    store._experts, store._pools, store._beside = experts, tuple(pools), beside
    store._origin = origin
    store._places = {view.layer_index: i for i, view in enumerate(experts.layers)}
    return store


def _reopen(source: Source, limit: int, options: dict[str, Any]) -> OffloadStore:
    """Return the store of a pickle."""
    return open_store(source, limit, **options)


def opened(file: Source | str | PathLike[str], prefix: str | None = None) -> Source:
    """The model that ``open_store`` was given, or the part of it that ``prefix`` says."""
    if isinstance(file, (str, PathLike)):
        path = Path(os.fsdecode(file))
        if path.is_dir() or path.name.endswith((".safetensors", ".index.json")):
            from moesaic.safetensors import CheckpointExperts  # files of GGUF do without

            return CheckpointExperts(file, prefix)
    if prefix is not None:
        raise error_of(
            _core.ConfigError, "open_store", "prefix",
            "the path of a checkpoint beside it, as a GGUF file holds one model", repr(file)[:80],
        )  # fmt: skip
    if not isinstance(file, (str, PathLike, _core.GgufFile)):
        from moesaic.safetensors import CheckpointExperts

        if isinstance(file, CheckpointExperts):
            return file
    # GgufFile refuses an object that is no path, and says what it takes.
    return file if isinstance(file, _core.GgufFile) else _core.GgufFile(file)


def stored_experts(
    operation: str,
    source: Source,
    memory: int,
    max_tokens: int | None,
    *,
    staging: int = 0,
    direct_io: bool | None = None,
    **options: Any,
) -> tuple[_core.MoeExpertStore, list[int], int]:
    """A store of a model, the budgets of its pools, and what is beside experts and buffers.

    All of it fits in ``memory``, with at least an expert of each layer; ``max_tokens`` are those of
    the workspace, None where neither it nor the other parts of layers count. Raises ConfigError,
    which says what is needed.
    """
    # As few buffers as there may be. They are never written to, so they take no memory.
    least = disk_store(
        source,
        memory_limit=memory if staging else 1 << 62,
        staging=staging or 2,
        direct_io=direct_io,
        io_threads=1,
    )
    buffers = least.memory()["staging"] or 0
    beside = 0 if max_tokens is None else _beside_experts(least, max_tokens)
    slots = least.slot_bytes([1] * least.num_layers)
    if memory < beside + buffers + slots:
        parts = f", {beside} of routers, shared experts and the workspace of {max_tokens} tokens"
        raise error_of(
            _core.ConfigError, operation, "memory",
            f"at least {beside + buffers + slots}: {slots} of an expert in each of"
            f" {least.num_layers} layers, {buffers} of buffers of reads"
            + (parts if beside else ""),
            str(memory),
            "a lower max_tokens needs less workspace" if beside else "",
        )  # fmt: skip
    # More buffers take at most half of what is left, beside the page that they may end in.
    spare = max(0, memory - beside - buffers - slots - _LARGE_PAGE)
    store = disk_store(
        source,
        memory_limit=memory - beside,
        staging=staging or min(_BUFFERS, 2 + spare // buffers),
        direct_io=direct_io,
        **options,
    )
    return store, store.fitting_budgets(), beside


def disk_store(source: Source, **options: Any) -> _core.MoeExpertStore:
    """A store that reads experts one by one, with options of ``MoeExpertStore.from_gguf``."""
    if isinstance(source, _core.GgufFile):
        return _core.MoeExpertStore.from_gguf(source, **options)
    return _core.MoeExpertStore.from_safetensors(source, **options)


def _beside_experts(store: _core.MoeExpertStore, max_tokens: int) -> int:
    """Bytes of all layers beside their experts, and of the workspace of one call."""
    parts = workspace = 0
    for view in store.layers:
        nothing = _core.ExpertPool(view.up.num_experts, 0)
        with _core.MoeLayer.from_store(store, view.layer_index, nothing) as layer:
            memory = layer.memory()
            parts += memory["total"] - sum(memory[role] for role in ("gate", "up", "down"))
            workspace = max(workspace, _core.Workspace.for_layer(layer, max_tokens).nbytes)
    return parts + workspace
