"""The compiled core of moesaic. Import names from ``moesaic`` instead.

This file is the only place where the signatures and docstrings of the compiled module are written:
editors and type checkers read it as it is, and the build turns it into what ``help`` and
``inspect.signature`` show (python/bindings/generate_docs.py).

Letters in shapes: T tokens, H hidden, I intermediate, E experts, P = T * top_k pairs. A pair is
``t * top_k + slot``. ``[..., H]`` has one or two dimensions before the last, which together count
the tokens: ``[T, H]`` or ``[batch, length, H]``. An array is anything with the buffer protocol or
``__dlpack__``.
"""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from os import PathLike
from typing import (
    Any,
    Final,
    Literal,
    Protocol,
    TypeAlias,
    TypedDict,
    TypeVar,
    final,
    overload,
    type_check_only,
)

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer, CapsuleType, Never, Self, Unpack

from moesaic.offload import ExpertProfile
from moesaic.safetensors import CheckpointExperts

# --- types of arguments -----------------------------------------------------------------------

@type_check_only
class _DLPack(Protocol):
    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

# Any array that is only read.
_AnyArray: TypeAlias = Buffer | _DLPack
# Arrays whose results are numpy arrays; results for other arrays are arrays of the same kind.
_Numpy: TypeAlias = npt.NDArray[Any] | memoryview | array[Any]
_F32: TypeAlias = npt.NDArray[np.float32]
_A = TypeVar("_A", bound=_AnyArray)

_Path: TypeAlias = str | PathLike[str]
_GgufSource: TypeAlias = GgufFile | _Path
# A CUDA stream object, its address, or None.
_Stream: TypeAlias = Any
_Progress: TypeAlias = Callable[[Progress], bool | None] | bool | None

_DType: TypeAlias = Literal["f32", "f16", "bf16", "f64", "i32", "i64", "u8", "u16", "bool"]
_Dense: TypeAlias = Literal["f32", "f16", "bf16"]
_Role: TypeAlias = Literal["gate", "up", "down"]
# One role's bytes, of a type: with the shape of the weights, or [E, rows, bytes of a row].
_Encoded: TypeAlias = tuple[_AnyArray, str, tuple[int, int, int]] | tuple[_AnyArray, str]
# Arrays by role; roles without one are absent, or None.
_ByRole: TypeAlias = Mapping[_Role, _AnyArray | None] | None
# Numbers of experts.
_ExpertIds: TypeAlias = Sequence[int] | _AnyArray
# A low-rank delta of a role: (A [E, r, cols], B [E, rows, r]), and a scale.
_Delta: TypeAlias = tuple[_AnyArray, _AnyArray] | tuple[_AnyArray, _AnyArray, float]
_Layout: TypeAlias = Literal["auto", "file"]
_WeightCache: TypeAlias = bool | _Path
_Precision: TypeAlias = Literal["auto", "exact", "fast"]
_Gemm: TypeAlias = Literal["auto", "bucketed", "aligned"]
_Route: TypeAlias = Literal["auto", "host", "device"]
_RowSpace: TypeAlias = Literal["token_pairs", "packed_rows"]
_RowSpaceMode: TypeAlias = Literal["auto", "token_pairs", "packed_rows"]
_ProfileMode: TypeAlias = Literal["counters", "events", "sync"]
_Log: TypeAlias = Literal["off", "error", "warn", "info", "debug"]
_ActivationKind: TypeAlias = Literal[
    "swiglu",
    "swiglu_clamp_input",
    "swiglu_clamp_output",
    "swiglu_oai",
    "geglu_tanh",
    "reglu",
    "gelu_tanh",
    "relu_squared",
    "situ",
]
# Editors complete the kinds; any text is accepted, since files name kinds too.
_ActivationName: TypeAlias = _ActivationKind | str
_Score: TypeAlias = Literal["softmax", "softmax_selected", "sigmoid", "sqrt_softplus"]
_Guard: TypeAlias = Literal["none", "add_eps", "clamp_min"]
_SelectOn: TypeAlias = Literal["scores", "logits", "given"]
_GroupReduce: TypeAlias = Literal["top2_sum", "max"]
_GroupMask: TypeAlias = Literal["minus_infinity", "zero"]
_WeightOn: TypeAlias = Literal["output", "input"]
_Shared: TypeAlias = Literal["none", "plain", "sigmoid_gated"]
_RouterInput: TypeAlias = Literal["experts", "norm", "separate"]
_CheckpointFormat: TypeAlias = Literal["gptq", "gptq_v2", "awq", "pack_quantized"]
_Ranking: TypeAlias = Literal["hits", "recency", "fixed"]
_Mode: TypeAlias = Literal["reuse", "refresh"]
_OnMiss: TypeAlias = Literal["compute", "stage", "error"]

tuning_variable: Final[ContextVar[Tuning | None]]
profile_variable: Final[ContextVar[Profile | None]]

# --- errors -----------------------------------------------------------------------------------

class Error(Exception):
    """Base of all errors of moesaic.

    The message says the operation, what was wrong, what was expected, what came, and a hint. Each
    of these is a field too, '' where the message lacks it.
    """

    operation: str
    what: str
    expected: str
    got: str
    hint: str

class ShapeError(Error, ValueError):
    """A size, stride or id does not fit."""

class FormatError(Error, ValueError):
    """A file is malformed or contradicts itself."""

class WorkspaceError(Error, ValueError):
    """A workspace is too small or used by another call."""

class ConfigError(Error, ValueError):
    """A setting has a bad value, or two settings contradict each other."""

class DTypeError(Error, TypeError):
    """An element type or kind of object is not accepted."""

class ArgumentError(Error, TypeError):
    """An argument is missing, unknown, one too many, or of another kind than its parameter."""

class UnsupportedError(Error, NotImplementedError):
    """Valid, but not available in this build or on this device."""

class DeviceError(Error, RuntimeError):
    """A device or file is absent, closed, in use or failed."""

class CaptureError(Error, RuntimeError):
    """Not possible while a graph is being captured."""

class OutOfMemoryError(Error, MemoryError):
    """An allocation failed."""

class OperationCancelled(Error):
    """A progress callback returned False."""

_E = TypeVar("_E", bound=Error)

def make_error(
    kind: type[_E],
    operation: str,
    what: str,
    expected: str = "",
    got: str = "",
    hint: str = "",
) -> _E:
    """Return an error of this class with these fields, and the message that they make."""

# --- arrays -----------------------------------------------------------------------------------

@final
class Array:
    """Memory of moesaic, or a view of another array under a name of its own.

    It closes two gaps: numpy has no bfloat16, and some array packages have no ``from_dlpack``.
    Consumers read it by ``__dlpack__`` or by the buffer protocol, where bf16 shows as uint16. The
    results of a call with an ``Array`` are ``Array`` objects. Make one with ``asarray``. It prints
    as numpy's arrays do.
    """

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def dtype(self) -> _DType:
        """Element type: 'f32', 'f16', 'bf16', 'f64', 'i32', 'i64', 'u8', 'u16' or 'bool'."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, outermost first."""

    @property
    def strides(self) -> tuple[int, ...]:
        """Steps from one element to the next in each dimension, in elements."""

    @property
    def device(self) -> str:
        """'cpu'."""

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""

    @property
    def readonly(self) -> bool:
        """Whether it is refused as ``out=``."""

    def __len__(self) -> int:
        """Size of the first dimension. Raises TypeError for an array without dimensions."""

    def __getitem__(self, index: Any) -> Any:
        """Return a view, or a number where every dimension has an integer.

        Parameters
        ----------
        index : int, slice, Ellipsis or tuple of them
            As numpy's basic indexing; what it leaves out is taken whole.

        Returns
        -------
        Array, float, int or bool
            A view shares the memory.

        Raises
        ------
        IndexError
            An integer out of range, or more indices than dimensions.
        DTypeError
            An index of another kind.

        Examples
        --------
        >>> import moesaic as mo
        >>> a = mo.asarray([[1, 2, 3], [4, 5, 6]], "f32")
        >>> a[1, ::2]
        moesaic.Array([4., 6.], dtype='f32')
        >>> a[0, -1]
        3.0
        """

    def __repr__(self) -> str: ...
    def __str__(self) -> str: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __release_buffer__(self, buffer: memoryview, /) -> None: ...
    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> CapsuleType:
        """Return a DLPack capsule of this memory.

        Parameters
        ----------
        stream : None
            Must be None, since the memory is the host's.
        max_version : tuple of int, optional
            The newest DLPack version that the consumer knows. Read-only memory needs (1, 0).
        dl_device : tuple of int, optional
            Must be (1, 0), the CPU.
        copy : bool, optional
            True copies first; None and False share the memory.

        Raises
        ------
        BufferError
            An argument that this memory cannot meet.
        """

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return (1, 0), the CPU in DLPack's numbers."""

def asarray(
    x: _AnyArray | Sequence[Any] | float, dtype: _DType | None = None, *, copy: bool | None = None
) -> Array:
    """View any array as an ``Array``, or convert it.

    Parameters
    ----------
    x : array, list or number
        An array in host memory; or, with ``dtype``, lists of numbers.
    dtype : str, optional
        The element type of the result. 'bf16' and 'f16' give the bits of a uint16 array that name;
        other values are converted, to the nearest that the type has. None: the type that ``x`` has.
    copy : bool, optional
        True copies, False never does; None copies only to convert.

    Returns
    -------
    Array
        A view of ``x``, which it keeps alive, or a copy.

    Raises
    ------
    DTypeError
        ``x`` is no array and no lists of numbers, or ``dtype`` no element type.
    ConfigError
        ``copy=False`` where values would have to be converted.
    DeviceError
        ``x`` is not in host memory.
    ShapeError
        More than 4 dimensions, or memory that is not aligned.
    UnsupportedError
        ``x`` needs gradients, or cannot export itself.

    Examples
    --------
    >>> import moesaic as mo, numpy as np
    >>> bits = np.array([0x3F80, 0x4000], np.uint16)
    >>> mo.asarray(bits, "bf16")
    moesaic.Array([1., 2.], dtype='bf16')
    >>> mo.asarray(np.ones(2), "f32").dtype  # converted from float64
    'f32'
    """

# --- files ------------------------------------------------------------------------------------

@final
class GgufTensor:
    """One tensor of a GGUF file; ``GgufFile.tensors`` has them."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def name(self) -> str:
        """Name in the file, such as 'blk.0.ffn_up_exps.weight'."""

    @property
    def quant(self) -> str:
        """Element type as ggml spells it, such as 'Q4_K'; 'type 144' for an unknown one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in elements, outermost first (the reverse of ggml's ``ne``)."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""

    @property
    def offset(self) -> int:
        """Byte offset from the start of its shard."""

    @property
    def shard(self) -> int:
        """Index into ``GgufFile.shard_paths``."""

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        """The stored bytes [nbytes], read-only.

        A view of the mapped file, or a fresh read when the file was opened with ``mmap=False``.
        The file cannot be closed while a view lives.

        Raises
        ------
        DeviceError
            The file is closed.
        UnsupportedError
            The type is unknown.
        OSError
            The read failed.
        """

    def __repr__(self) -> str: ...

@final
class GgufMetadata(Mapping[str, Any]):
    """The metadata of a GGUF file as a mapping; an array becomes a list when it is asked for."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    def __getitem__(self, key: str) -> Any:
        """Return the value of ``key``. Raises KeyError."""

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys, in the order of the file."""

    def __len__(self) -> int:
        """Return the number of keys."""

    def __contains__(self, key: object, /) -> bool:
        """Return whether there is such a key."""

    def __repr__(self) -> str: ...

@final
class GgufTensors(Mapping[str, GgufTensor]):
    """The tensors of a GGUF file by name."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    def __getitem__(self, key: str) -> GgufTensor:
        """Return the tensor named ``key``. Raises KeyError."""

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, in the order of the file."""

    def __len__(self) -> int:
        """Return the number of tensors."""

    def __contains__(self, key: object, /) -> bool:
        """Return whether there is such a tensor."""

    def __repr__(self) -> str: ...

@final
class GgufFile:
    """A GGUF file, or all shards of one, as an index over bytes that stay in the file.

    A pickle of it has the absolute path, and opens the file again where it is unpickled; a file
    that has changed since is a FormatError there.

    A context manager. Any ``name-00001-of-0000N.gguf`` stands for all shards of its name. The
    format is that of ggml (docs/gguf.md in the ggml repository).

    Parameters
    ----------
    path : str or path-like
        The file, or one of its shards.
    mmap : bool
        Whether to map the file. Without it, tensors are read when they are asked for, which is
        safe against a file that is truncated later.

    Raises
    ------
    FileNotFoundError, OSError
        The file is absent or cannot be read.
    FormatError
        The file is malformed; the message has the byte offset and the field.

    Examples
    --------
    >>> import moesaic as mo
    >>> _ = mo.testing.write_moe_gguf("model.gguf")  # a small model with random weights
    >>> with mo.GgufFile("model.gguf") as f:
    ...     f.metadata["general.architecture"], f.moe_layers
    ...     f.tensors["blk.0.ffn_up_exps.weight"].shape
    ('qwen3moe', [0])
    (8, 256, 256)
    """

    def __init__(self, path: _Path, *, mmap: bool = True) -> None: ...
    @property
    def path(self) -> str:
        """The path as given."""

    @property
    def shard_paths(self) -> list[str]:
        """All files, in order."""

    @property
    def version(self) -> int:
        """GGUF version of the file."""

    @property
    def nbytes(self) -> int:
        """Bytes of all shards together."""

    @property
    def metadata(self) -> GgufMetadata:
        """Mapping of keys to values."""

    @property
    def tensors(self) -> GgufTensors:
        """Mapping of names to ``GgufTensor``."""

    @property
    def moe_layers(self) -> list[int]:
        """Numbers of the blocks that hold expert tensors, ascending."""

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""

    def close(self) -> None:
        """Let go of the bytes; the index stays readable. A second call does nothing.

        Raises
        ------
        DeviceError
            Tensors of the file are in use: by arrays, or by a stack that reads them in place.
        """

    def __enter__(self) -> Self:
        """Return the file. Raises DeviceError when it is closed."""

    def __exit__(self, *exc_info: object) -> None:
        """Close the file."""

    def __repr__(self) -> str: ...

# --- model facts ------------------------------------------------------------------------------

@type_check_only
class _ActivationFields(TypedDict, total=False):
    kind: _ActivationName
    limit: float
    alpha: float
    beta: float
    linear_beta: float

@final
class Activation:
    """What happens between the gate and up products and the down product; immutable.

    With g a gate value, u an up value, L ``limit`` and sigmoid and silu as usual:

    - swiglu: silu(g) * u
    - swiglu_clamp_input: silu(min(g, L)) * clamp(u, -L, L)
    - swiglu_clamp_output: min(silu(g), L) * clamp(u, -L, L)
    - swiglu_oai: g' * sigmoid(alpha * g') * (u' + 1) with g' = min(g, L), u' = clamp(u, -L, L)
    - geglu_tanh: gelu_tanh(g) * u
    - reglu: relu(g) * u
    - gelu_tanh: gelu_tanh(u), no gate
    - relu_squared: relu(u) ** 2, no gate
    - situ: b * tanh(g / b) * sigmoid(g) * lb * tanh(u / lb), with b ``beta`` and lb
      ``linear_beta``; lb = 0 means plain u

    Parameters
    ----------
    kind : str
        Name of the formula.
    limit : float
        L of the clamped forms, positive.
    alpha : float
        Factor in swiglu_oai, finite.
    beta : float
        b of situ, positive.
    linear_beta : float
        lb of situ, not negative.

    Raises
    ------
    ConfigError
        An unknown kind, or a number without meaning.

    Examples
    --------
    >>> import moesaic as mo
    >>> mo.Activation("reglu")(2.0, 3.0)
    6.0
    """

    def __init__(
        self,
        kind: _ActivationName = "swiglu",
        *,
        limit: float = 7.0,
        alpha: float = 1.702,
        beta: float = 1.0,
        linear_beta: float = 0.0,
    ) -> None: ...
    @property
    def kind(self) -> _ActivationKind:
        """Name of the formula."""

    @property
    def limit(self) -> float:
        """L of the clamped forms."""

    @property
    def alpha(self) -> float:
        """Factor in swiglu_oai."""

    @property
    def beta(self) -> float:
        """The b of situ."""

    @property
    def linear_beta(self) -> float:
        """The lb of situ; 0 means plain u."""

    @property
    def gated(self) -> bool:
        """Whether it reads a gate value."""

    def __call__(self, g: float, u: float) -> float:
        """Return the activation of one gate value and one up value; ungated kinds ignore ``g``."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as JSON takes them."""

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Activation:
        """Return what ``to_dict`` gave, as it is or out of JSON.

        Parameters
        ----------
        fields : mapping
            Values by the names of the fields; those left out have their defaults.

        Returns
        -------
        Activation

        Raises
        ------
        TypeError
            A name that is no field; the message has the nearest one.
        ConfigError
            As the constructor.
        """

    def replace(self, **changes: Unpack[_ActivationFields]) -> Activation:
        """Return a copy with some fields changed, checked as a new one.

        Raises
        ------
        ConfigError
            As the constructor.
        TypeError
            A name that is no field; the message has the nearest one.
        """

    def __eq__(self, other: object, /) -> bool:
        """Return whether all fields are equal."""

    def __hash__(self) -> int: ...
    def __repr__(self) -> str: ...

@type_check_only
class _RouterConfigFields(TypedDict, total=False):
    num_experts: int
    top_k: int
    score: _Score
    renormalize: bool
    guard: _Guard
    guard_eps: float
    scale: float
    select_on: _SelectOn
    num_groups: int
    groups_used: int
    group_reduce: _GroupReduce
    group_mask: _GroupMask
    weight_on: _WeightOn
    identity_experts: int
    router_bias: Sequence[float]
    selection_bias: Sequence[float]

@final
class RouterConfig:
    """A router, factored into independent facts; immutable.

    The steps in order: logits (plus ``router_bias``), score, selection (plus ``selection_bias``,
    within groups), top-k, weights from the scores without the selection bias, renormalisation,
    scale.

    Parameters
    ----------
    num_experts : int
        E of the logits, identity experts included.
    top_k : int
        Experts per token.
    score : str
        What turns a logit into a score: 'softmax' over all experts, 'softmax_selected' (over the
        selected ones), 'sigmoid', or 'sqrt_softplus', the square root of log(1 + exp(logit)).
    renormalize : bool
        Whether the selected weights are made to sum to one.
    guard : str
        What keeps that division from zero: 'none', 'add_eps' (sum + eps) or 'clamp_min'
        (max(sum, eps)).
    guard_eps : float
        eps of the guard.
    scale : float
        Factor on the weights; 0 and 1 both mean none.
    select_on : str
        What top-k reads: 'scores' or 'logits'; with 'given' the ids come with the call, and only
        their weights are computed.
    num_groups : int
        Groups of experts; must divide E.
    groups_used : int
        Groups that a token may use.
    group_reduce : str
        Score of a group: 'top2_sum', the sum of its two best, or 'max'.
    group_mask : str
        What experts of other groups become: 'minus_infinity' or 'zero'.
    weight_on : str
        'output', or 'input': x is scaled before the expert, which then counts with weight 1.
    identity_experts : int
        How many of the last ids have no weights: they give x itself.
    router_bias : sequence of float
        Empty or [E], added to the logits.
    selection_bias : sequence of float
        Empty or [E], added for the selection only.

    Raises
    ------
    ConfigError
        An unknown word, or a contradiction such as top_k > num_experts.
    """

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        *,
        score: _Score = "softmax",
        renormalize: bool = True,
        guard: _Guard = "none",
        guard_eps: float = 0.0,
        scale: float = 1.0,
        select_on: _SelectOn = "scores",
        num_groups: int = 1,
        groups_used: int = 1,
        group_reduce: _GroupReduce = "top2_sum",
        group_mask: _GroupMask = "minus_infinity",
        weight_on: _WeightOn = "output",
        identity_experts: int = 0,
        router_bias: Sequence[float] = (),
        selection_bias: Sequence[float] = (),
    ) -> None: ...
    @property
    def num_experts(self) -> int:
        """E of the logits, identity experts included."""

    @property
    def top_k(self) -> int:
        """Experts per token."""

    @property
    def score(self) -> _Score:
        """What turns a logit into a score."""

    @property
    def renormalize(self) -> bool:
        """Whether the selected weights are made to sum to one."""

    @property
    def guard(self) -> _Guard:
        """What keeps the renormalising division from zero."""

    @property
    def guard_eps(self) -> float:
        """The eps of the guard."""

    @property
    def scale(self) -> float:
        """Factor on the weights; 0 and 1 both mean none."""

    @property
    def select_on(self) -> _SelectOn:
        """What top-k reads; 'given' means that ids come with the call."""

    @property
    def num_groups(self) -> int:
        """Groups of experts."""

    @property
    def groups_used(self) -> int:
        """Groups that a token may use."""

    @property
    def group_reduce(self) -> _GroupReduce:
        """Score of a group."""

    @property
    def group_mask(self) -> _GroupMask:
        """What experts of other groups become."""

    @property
    def weight_on(self) -> _WeightOn:
        """Whether the weight scales the expert's output or its input."""

    @property
    def identity_experts(self) -> int:
        """How many of the last ids have no weights: they give x itself."""

    @property
    def router_bias(self) -> list[float]:
        """Empty or [E], added to the logits."""

    @property
    def selection_bias(self) -> list[float]:
        """Empty or [E], added for the selection only."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as JSON takes them."""

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> RouterConfig:
        """Return what ``to_dict`` gave, as it is or out of JSON.

        Parameters
        ----------
        fields : mapping
            Values by the names of the fields; those left out have their defaults.

        Returns
        -------
        RouterConfig

        Raises
        ------
        TypeError
            A name that is no field; the message has the nearest one.
        ConfigError
            As the constructor.
        """

    def replace(self, **changes: Unpack[_RouterConfigFields]) -> RouterConfig:
        """Return a copy with some fields changed, checked as a new one.

        Raises
        ------
        ConfigError
            As the constructor.
        TypeError
            A name that is no field; the message has the nearest one.
        """

    def __eq__(self, other: object, /) -> bool:
        """Return whether all fields are equal."""

    def __hash__(self) -> int: ...
    def __repr__(self) -> str: ...

@type_check_only
class _MoeConfigFields(TypedDict, total=False):
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    activation: Activation | _ActivationName
    router: RouterConfig | None
    shared: _Shared
    shared_intermediate_size: int
    shared_activation: Activation | _ActivationName | None
    shared_scale: float
    latent_size: int
    latent_norm: bool
    input_norm: bool
    router_input: _RouterInput
    norm_eps: float
    vocab_size: int
    architecture: str
    layer: int

@final
class MoeConfig:
    """Facts of one MoE layer of a model; immutable.

    Parameters
    ----------
    hidden_size : int
        H of x and of y.
    intermediate_size : int
        I of a routed expert.
    num_experts : int
        Experts with weights.
    top_k : int
        Experts per token.
    activation : Activation or str
        Activation of the experts, or its kind.
    router : RouterConfig, optional
        None: softmax over the experts, renormalised.
    shared : str
        Shared experts: 'none', 'plain', or 'sigmoid_gated', whose sum is scaled by a sigmoid.
    shared_intermediate_size : int
        I of all shared experts together.
    shared_activation : Activation or str, optional
        None: as ``activation``.
    shared_scale : float
        Factor of the shared experts' sum: 0.5 where a model takes the mean of the routed and the
        shared experts, and ``router.scale`` has the other half.
    latent_size : int
        Width at which the experts run, between a projection down and one up; 0 means at H.
    latent_norm : bool
        Whether the latent sum passes an RMS norm before the projection up.
    input_norm : bool
        Whether x passes an RMS norm before the experts.
    router_input : str
        What the router reads: what the 'experts' read, x under a 'norm' of its own, or a
        'separate' array of each call.
    norm_eps : float
        eps of these RMS norms.
    vocab_size : int
        Rows of the table that routes by token id; 0 means no table.
    architecture : str
        GGUF architecture string, or the caller's own.
    layer : int
        Block number in the model.

    Raises
    ------
    ConfigError
        An unknown word, or a top_k that the experts do not allow.

    Examples
    --------
    >>> import moesaic as mo
    >>> config = mo.MoeConfig(256, 128, num_experts=8, top_k=2)
    >>> config.replace(top_k=4, router=None).router.top_k
    4
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: Activation | _ActivationName = "swiglu",
        router: RouterConfig | None = None,
        shared: _Shared = "none",
        shared_intermediate_size: int = 0,
        shared_activation: Activation | _ActivationName | None = None,
        shared_scale: float = 1.0,
        latent_size: int = 0,
        latent_norm: bool = False,
        input_norm: bool = False,
        router_input: _RouterInput = "experts",
        norm_eps: float = 1e-6,
        vocab_size: int = 0,
        architecture: str = "",
        layer: int = 0,
    ) -> None: ...
    @staticmethod
    def from_gguf(file: _GgufSource, layer: int) -> MoeConfig:
        """Read the facts of one layer from the metadata of a GGUF file.

        Parameters
        ----------
        file : GgufFile or path
            The model. A path is opened for this call.
        layer : int
            Block number.

        Returns
        -------
        MoeConfig

        Raises
        ------
        FileNotFoundError, OSError
            ``file`` is a path that is absent or cannot be read.
        UnsupportedError
            An architecture without a preset, or one that needs a part that is missing here.
        FormatError
            Missing, unknown or contradictory values.
        ShapeError
            A layer without experts.
        """

    @staticmethod
    def from_hf(config: Any, layer: int = 0) -> MoeConfig:
        """Read the facts of one layer from a Hugging Face configuration.

        Biases are tensors of the checkpoint, so they stay empty here.

        Parameters
        ----------
        config : dict, str, path-like or object
            The configuration as a dict, the path of a config.json, or an object with
            ``to_dict()``.
        layer : int
            Number of the layer.

        Returns
        -------
        MoeConfig

        Raises
        ------
        FileNotFoundError, OSError
            ``config`` is a path that is absent or cannot be read.
        UnsupportedError
            A model type without a preset, or a part that is missing here.
        FormatError
            Missing or unknown values.
        ShapeError
            A layer without experts.
        """

    @property
    def hidden_size(self) -> int:
        """H of x and of y."""

    @property
    def intermediate_size(self) -> int:
        """I of a routed expert."""

    @property
    def num_experts(self) -> int:
        """Experts with weights."""

    @property
    def top_k(self) -> int:
        """Experts per token."""

    @property
    def activation(self) -> Activation:
        """Activation of the experts."""

    @property
    def router(self) -> RouterConfig:
        """How tokens are routed."""

    @property
    def shared(self) -> _Shared:
        """Kind of the shared experts."""

    @property
    def shared_intermediate_size(self) -> int:
        """I of all shared experts together."""

    @property
    def shared_activation(self) -> Activation:
        """Activation of the shared experts."""

    @property
    def shared_scale(self) -> float:
        """Factor of the shared experts' sum."""

    @property
    def latent_size(self) -> int:
        """Width at which the experts run; 0 means at H."""

    @property
    def latent_norm(self) -> bool:
        """Whether the latent sum passes an RMS norm."""

    @property
    def input_norm(self) -> bool:
        """Whether x passes an RMS norm before the experts."""

    @property
    def router_input(self) -> _RouterInput:
        """What the router reads."""

    @property
    def norm_eps(self) -> float:
        """The eps of the RMS norms."""

    @property
    def vocab_size(self) -> int:
        """Rows of the table that routes by token id; 0 means no table."""

    @property
    def architecture(self) -> str:
        """GGUF architecture string, or the caller's own."""

    @property
    def layer(self) -> int:
        """Block number in the model."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as JSON takes them."""

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> MoeConfig:
        """Return what ``to_dict`` gave, as it is or out of JSON.

        Parameters
        ----------
        fields : mapping
            Values by the names of the fields; those left out have their defaults.

        Returns
        -------
        MoeConfig

        Raises
        ------
        TypeError
            A name that is no field; the message has the nearest one.
        ConfigError
            As the constructor.
        """

    def replace(self, **changes: Unpack[_MoeConfigFields]) -> MoeConfig:
        """Return a copy with some fields changed, checked as a new one.

        Raises
        ------
        ConfigError
            As the constructor.
        TypeError
            A name that is no field; the message has the nearest one.
        """

    def __eq__(self, other: object, /) -> bool:
        """Return whether all fields are equal."""

    def __hash__(self) -> int: ...
    def __repr__(self) -> str: ...

def known_architectures() -> list[str]:
    """Return the GGUF architecture strings whose MoE layers open.

    Examples
    --------
    >>> import moesaic as mo
    >>> "qwen3moe" in mo.known_architectures()
    True
    """

def architecture_table() -> list[dict[str, str]]:
    """Return the presets in words, as ``moesaic.architecture_table``."""

def layer_kinds(file: _GgufSource) -> list[Literal["dense", "moe", "none"]]:
    """Return what the feed-forward part of each block of a file is, by its tensors.

    Parameters
    ----------
    file : GgufFile or path
        The model. A path is opened for this call.

    Returns
    -------
    list of str
        'dense', 'moe' or 'none' for each block.

    Raises
    ------
    FileNotFoundError, OSError
        ``file`` is a path that is absent or cannot be read.
    FormatError
        Malformed metadata.
    DeviceError
        The file is closed.
    """

def model_facts(model: str) -> dict[str, Any]:
    """Return one row of the table of models, by the words of RouterConfig and MoeConfig.

    Parameters
    ----------
    model : str
        A name of the table (cpp/src/model/model_table.hpp).

    Returns
    -------
    dict
        Facts of the router and the layer that the model itself fixes.

    Raises
    ------
    ConfigError
        A name that the table lacks.
    """

def model_config(
    model: str,
    *,
    architecture: str,
    layer: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    score: str | None = None,
    renormalize: bool | None = None,
    guard_eps: float | None = None,
    scale: float = 1.0,
    num_groups: int = 1,
    groups_used: int = 1,
    identity_experts: int = 0,
    vocab_size: int = 0,
    activation: str | None = None,
    limit: float | None = None,
    alpha: float | None = None,
    shared_intermediate_size: int = 0,
    averaged: bool | None = None,
    latent_size: int = 0,
    norm_eps: float = 1e-6,
) -> MoeConfig:
    """Make the configuration of a layer: the facts of a model with the values of a file.

    Parameters
    ----------
    model : str
        A name of the table of models.
    architecture : str
        Becomes ``MoeConfig.architecture``.
    layer, hidden_size, intermediate_size, num_experts, top_k : int
        As in MoeConfig.
    score, renormalize, guard_eps, activation, limit, alpha : optional
        Values of the file that stand for those of the model; None leaves the model's.
    scale, num_groups, groups_used, identity_experts : float or int
        As in RouterConfig.
    vocab_size, shared_intermediate_size, latent_size, norm_eps : int or float
        As in MoeConfig.
    averaged : bool or None
        Whether y is the mean of what the routed and the shared experts sum to, or their sum; None
        leaves it to the model.

    Returns
    -------
    MoeConfig

    Raises
    ------
    ConfigError
        An unknown word, or a router that contradicts itself.
    """

# --- weights and the layer --------------------------------------------------------------------

@final
class Progress:
    """What a load or a write tells its ``progress`` callback."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def done_bytes(self) -> int:
        """Bytes finished."""

    @property
    def total_bytes(self) -> int:
        """Bytes to do."""

    @property
    def what(self) -> str:
        """Name of the tensor that is being loaded or written."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as JSON takes them."""

    def __eq__(self, other: object, /) -> bool:
        """Return whether all fields are equal."""

    def __hash__(self) -> int: ...
    def __repr__(self) -> str: ...

def make_progress(done_bytes: int, total_bytes: int, what: str) -> Progress:
    """A ``Progress`` of work that is done in Python.

    Parameters
    ----------
    done_bytes : int
        Bytes finished.
    total_bytes : int
        Bytes to do.
    what : str
        Name of the tensor.
    """

@final
class RoleReport:
    """What happened to one role at load, and why."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def role(self) -> _Role:
        """'gate', 'up' or 'down'."""

    @property
    def stored(self) -> str:
        """Element type in the source, as ggml spells it."""

    @property
    def kept(self) -> str:
        """Element type in memory, as ggml spells it."""

    @property
    def source(self) -> str:
        """Name of the tensor, or 'array'."""

    @property
    def decision(self) -> str:
        """What was done with the weights.

        'mapped', 'read', 'copied', 'encoded', 'repacked', 'cached' (repacked before), 'dequantized'
        or 'referenced'.
        """

    @property
    def reason(self) -> str:
        """Why it was so decided."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as JSON takes them."""

    def __eq__(self, other: object, /) -> bool:
        """Return whether all fields are equal."""

    def __hash__(self) -> int: ...
    def __repr__(self) -> str: ...

@final
class LoadReport:
    """What a load kept, repacked or dequantised; ``print`` shows it."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def roles(self) -> list[RoleReport]:
        """A report for each role that the experts have: gate, up, down."""

    @property
    def seconds(self) -> float:
        """How long it took."""

    def __str__(self) -> str:
        """Return one line per role, and the time."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as JSON takes them."""

    def __eq__(self, other: object, /) -> bool:
        """Return whether all fields are equal."""

    def __hash__(self) -> int: ...
    def __repr__(self) -> str: ...

@final
class MarlinLinear:
    """Columns of one INT4 expert as a linear layer; ``MarlinExpertStack`` makes them."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def in_features(self) -> int:
        """K, the columns of x."""

    @property
    def out_features(self) -> int:
        """Columns of the result."""

    @overload
    def __call__(
        self,
        x: _Numpy,
        *,
        out: _AnyArray | None = None,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> _F32:
        """Return x @ W.T, plus the bias if there is one.

        Parameters
        ----------
        x : array [m, in_features]
            f32, f16 or bf16, on the device of the stack.
        out : f32 array [m, out_features], optional
            Written to and returned.
        precision : str, optional
            'exact' or 'fast'; None and 'auto' leave the choice to the tuning.
        stream : object, optional
            CUDA stream that the call joins; None: the current one of the package of ``x``.

        Returns
        -------
        f32 array [m, out_features]
            ``out``, or a new array of the kind of ``x``.

        Raises
        ------
        ShapeError, DTypeError, DeviceError
            ``x`` or ``out`` does not fit.
        """

    @overload
    def __call__(
        self,
        x: _A,
        *,
        out: _AnyArray | None = None,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> _A: ...
    def __repr__(self) -> str: ...

@final
class MarlinExpertStack:
    """INT4 weights [K, n_per_expert] of all experts, in groups along K with a scale each.

    Made from the tensors of a GPTQ or AWQ checkpoint, kept in the layout of the Marlin kernels
    (IST-DASLab/marlin) on a GPU and in a layout of its own on the host.
    """

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @staticmethod
    def from_gptq(
        qweight: _AnyArray,
        scales: _AnyArray,
        qzeros: _AnyArray | None = None,
        g_idx: _AnyArray | None = None,
        group_size: int = 128,
        checkpoint_format: _CheckpointFormat = "gptq",
    ) -> MarlinExpertStack:
        """Repack the tensors of a checkpoint, with the experts stacked.

        Parameters
        ----------
        qweight : int32 array [E, K/8, N]
            Eight 4-bit codes per element along K. With 'awq' [E, K, N/8], with 'pack_quantized'
            [E, N, K/8].
        scales : f16, bf16 or f32 array [E, groups, N]
            With 'pack_quantized' [E, N, groups].
        qzeros : int32 array [E, groups, N/8], optional
            Zero points; None: every one is 8. With 'pack_quantized' [E, N/8, groups].
        g_idx : int32 array [K] or [E, K], optional
            Group of each input feature; None: k / group_size.
        group_size : int
            Input features per group; -1: one group per column.
        checkpoint_format : str
            'gptq' (zero points are stored one too small), 'gptq_v2', 'awq', or 'pack_quantized'
            of compressed-tensors.

        Returns
        -------
        MarlinExpertStack

        Raises
        ------
        ShapeError, DTypeError
            A tensor does not fit; the message names it.
        FormatError
            A g_idx outside the groups.
        """

    @property
    def num_experts(self) -> int:
        """E."""

    @property
    def k(self) -> int:
        """Input features."""

    @property
    def n_per_expert(self) -> int:
        """Output features of an expert."""

    @property
    def group_size(self) -> int:
        """Input features of a group; ``k`` with one group per column."""

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is 8."""

    @property
    def act_order(self) -> bool:
        """Whether there is a g_idx."""

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""

    @property
    def device(self) -> str:
        """Where the products run: 'cpu', 'cuda:0' and so on."""

    def to(self, device: str) -> MarlinExpertStack:
        """Return the stack for products on ``device``.

        On CUDA it is a repacked copy, beside the memory of the host, which both stacks share:
        ``unpack``, ``repack``, ``dequantize`` and ``ExpertStack.from_marlin`` read that. On Metal
        it is that memory. Linears cut out of the new stack lie on the device too.

        Parameters
        ----------
        device : str
            'cpu', 'cuda:0' and so on.

        Returns
        -------
        MarlinExpertStack

        Raises
        ------
        DeviceError
            The backend is absent.
        UnsupportedError
            The device has no kernels for these sizes.
        OutOfMemoryError
            The copy does not fit.
        """

    def zero_workspace(self) -> None:
        """Do nothing: no kernel here keeps locks, and results are written whole."""

    def unpack(self, expert: int) -> dict[str, Any]:
        """Return one expert as it was before it was packed.

        Parameters
        ----------
        expert : int
            0 to E - 1.

        Returns
        -------
        dict
            'codes' uint8 [K, N], 'scales' f32 [groups, N], 'zeros' uint8 [groups, N], and
            'g_idx' int32 [K] or None.

        Raises
        ------
        ShapeError
            No such expert.
        """

    def repack(
        self, layout: Literal["marlin", "p4"], expert: int, *, interleave_gate_up: bool = False
    ) -> dict[str, Any]:
        """Return one expert in a layout that kernels elsewhere read.

        Parameters
        ----------
        layout : str
            'marlin' or 'p4'; cpp/src/int4/README.md describes both.
        expert : int
            0 to E - 1.
        interleave_gate_up : bool
            With 'p4': gate and up rows alternate.

        Returns
        -------
        dict
            'marlin': qweight int32 [K/16, 2N], scales, qzeros and perm. 'p4': bytes, side_scales,
            side_zeros, row_block_bytes, packed_rows, packed_cols and perm.

        Raises
        ------
        ConfigError
            An unknown layout.
        UnsupportedError
            The layout does not have these sizes.
        ShapeError
            No such expert.
        """

    def dequantize(self, expert: int) -> _F32:
        """Return one expert as f32 [n_per_expert, K]. Raises ShapeError."""

    @overload
    def gemm_phase_batched(
        self,
        x_packed: _Numpy,
        dispatches: Sequence[tuple[int, int, int, int]],
        *,
        out: _AnyArray | None = None,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> _F32:
        """Multiply runs of rows, each with one expert.

        For each (expert, in_row, out_row, rows), the rows from ``out_row`` on become the rows of
        ``x_packed`` from ``in_row`` on, times W[expert].T.

        Parameters
        ----------
        x_packed : array [M, K]
            f32, f16 or bf16, on the device of the stack.
        dispatches : sequence of tuple of int
            (expert, in_row, out_row, rows); any number of rows.
        out : f32 array [rows, n_per_expert], optional
            Written to and returned. Rows that no dispatch names are left alone; in a new array
            they are zero.
        precision : str, optional
            'exact' or 'fast'; None and 'auto' leave the choice to the tuning.
        stream : object, optional
            CUDA stream that the call joins; None: the current one of the package of ``x_packed``.
            On a GPU the call copies the dispatches there and waits for its launches.

        Returns
        -------
        f32 array [rows, n_per_expert]
            ``out``, or a new array of the kind of ``x_packed``.

        Raises
        ------
        ShapeError
            Rows outside, an expert out of range, or a row of the result named twice.
        DTypeError, DeviceError
            ``x_packed`` or ``out`` does not fit.
        CaptureError
            A graph is being recorded.
        """

    @overload
    def gemm_phase_batched(
        self,
        x_packed: _A,
        dispatches: Sequence[tuple[int, int, int, int]],
        *,
        out: _AnyArray | None = None,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> _A: ...
    @overload
    def gemm_phase_vllm(
        self,
        x: _Numpy,
        aligned: AlignedRouting,
        top_k: int,
        *,
        out: _AnyArray | None = None,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> _F32:
        """Multiply over aligned blocks, as vLLM's fused MoE kernels do.

        Sorted id v reads row v // top_k of ``x`` and writes row v of the result; rows of skipped
        pairs become zero.

        Parameters
        ----------
        x : array [P / top_k, K]
            f32, f16 or bf16, on the device of the stack.
        aligned : AlignedRouting
            The blocks; with row space 'packed_rows' only for a ``top_k`` of 1.
        top_k : int
            Pairs per row of ``x``.
        out : f32 array [P, n_per_expert], optional
            Written to and returned.
        precision : str, optional
            'exact' or 'fast'; None and 'auto' leave the choice to the tuning.
        stream : object, optional
            As in ``gemm_phase_batched``.

        Returns
        -------
        f32 array [P, n_per_expert]
            ``out``, or a new array of the kind of ``x``.

        Raises
        ------
        ShapeError
            x.shape[0] * top_k is not P, or packed rows with another top_k than 1.
        DTypeError, DeviceError, CaptureError
            As in ``gemm_phase_batched``.
        """

    @overload
    def gemm_phase_vllm(
        self,
        x: _A,
        aligned: AlignedRouting,
        top_k: int,
        *,
        out: _AnyArray | None = None,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> _A: ...
    def make_expert_linear(
        self,
        expert: int,
        first_col: int = 0,
        cols: int | None = None,
        bias: _AnyArray | None = None,
    ) -> MarlinLinear:
        """Cut columns of one expert out as a linear layer.

        It shares the memory of the stack; on a GPU it has its own.

        Parameters
        ----------
        expert : int
            0 to E - 1.
        first_col : int
            First column, a multiple of 64.
        cols : int, optional
            Number of columns, a multiple of 64 or up to the end. None: to the end.
        bias : array [cols], optional
            f32, f16 or bf16, added to each row.

        Returns
        -------
        MarlinLinear

        Raises
        ------
        ShapeError
            Columns outside or not at multiples of 64, or a bias of another length.
        """

    def __repr__(self) -> str: ...

@final
class MarlinStackBuilder:
    """Packs experts one by one into one buffer; ``load_from_safetensors`` uses it.

    Parameters
    ----------
    num_experts, k, n_per_expert, group_size : int
        As the properties of ``MarlinExpertStack``.
    format : str
        As ``checkpoint_format`` of ``MarlinExpertStack.from_gptq``.
    f32_scales : bool
        Whether scales are kept as f32; else as f16.
    zeros : bool
        Whether the tensors have zero points.
    g_idx : int32 array [K], optional
        Group of each input feature, for all experts.

    Raises
    ------
    ShapeError, DTypeError, ConfigError
        Sizes, tensors or words that do not fit.
    """

    def __init__(
        self,
        num_experts: int,
        k: int,
        n_per_expert: int,
        group_size: int,
        format: _CheckpointFormat,
        *,
        f32_scales: bool = False,
        zeros: bool = True,
        g_idx: _AnyArray | None = None,
    ) -> None: ...
    def add(
        self,
        expert: int,
        first_col: int,
        qweight: _AnyArray,
        scales: _AnyArray,
        qzeros: _AnyArray | None,
        name: str,
    ) -> None:
        """Pack the columns from ``first_col`` on, of tensors without the leading E.

        Raises
        ------
        ShapeError, DTypeError, FormatError
            A tensor does not fit; the message has ``name``.
        """

    def build(self) -> MarlinExpertStack:
        """Return the stack; call it once. Raises ShapeError when columns are missing."""

# (type name, source, decision, reason), as in a RoleReport.
_EncodedRole: TypeAlias = tuple[str, str, str, str]

@final
class StackBuilder:
    """Takes encoded experts one by one; ``load_from_safetensors`` uses it.

    Parameters
    ----------
    num_experts, hidden_size, intermediate_size : int
        E, H and I.
    gate, up, down : tuple of str
        (type name, source, decision, reason) of each role, as a ``RoleReport`` shows them; gate is
        None for ungated experts.
    experts : sequence of int, optional
        The experts that the stack keeps. None: all.

    Raises
    ------
    ConfigError
        An unknown type name.
    ShapeError
        ``experts`` that are not there or named twice.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        gate: _EncodedRole | None,
        up: _EncodedRole,
        down: _EncodedRole,
        experts: Sequence[int] | None = None,
    ) -> None: ...
    def add(
        self,
        role: str,
        expert: int,
        rows: _AnyArray | None,
        scale: float = 1.0,
        bias: _AnyArray | None = None,
    ) -> None:
        """Take one matrix, row after row, as a GGUF tensor holds it.

        Parameters
        ----------
        role : str
            'gate', 'up' or 'down'.
        expert : int
            0 to E - 1, one that is kept.
        rows : array, optional
            The encoded bytes, dense. None: of a role that came from a weight cache.
        scale : float
            Factor on the products of this matrix.
        bias : array, optional
            Added to the products, one value per row of the matrix.

        Raises
        ------
        ShapeError, DTypeError, ConfigError
            An argument that does not fit.
        """

@final
class ExpertStack:
    """The expert weights of one layer: gate, up and down, each kept in its own type.

    A stack that came from files pickles as the way to read it again.

    Examples
    --------
    >>> import moesaic as mo, numpy as np
    >>> rng = np.random.default_rng(0)
    >>> gate, up = (rng.standard_normal((4, 64, 32), np.float32) for _ in range(2))  # [E, I, H]
    >>> down = rng.standard_normal((4, 32, 64), np.float32)  # [E, H, I]
    >>> stack = mo.ExpertStack.from_dense_stacks(gate, up, down)
    >>> stack.gemv_gate(np.ones(32, np.float32), np.array([3, 1], np.int32)).shape
    (2, 64)
    """

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @staticmethod
    def from_dense_stacks(
        gate: _AnyArray | None,
        up: _AnyArray,
        down: _AnyArray,
        *,
        quant: str | Mapping[_Role, str] | None = None,
        weights: _ByRole = None,
        biases: _ByRole = None,
        scales: _ByRole = None,
        device: str = "cpu",
        layout: _Layout = "auto",
        progress: _Progress = None,
    ) -> ExpertStack:
        """Copy dense matrices, or encode them.

        An expert's product with a role is y = (W x) * scale + bias.

        Parameters
        ----------
        gate : array [E, I, H], optional
            f32, f16 or bf16; None for ungated experts.
        up : array [E, I, H]
            f32, f16 or bf16.
        down : array [E, H, I]
            f32, f16 or bf16.
        quant : str or dict, optional
            The type to encode in, such as 'Q4_K', for all roles or by role; roles without one stay
            as they are. Experts are encoded one after another, on all threads, as ``quantize``
            does; ``report`` says which were.
        weights : dict, optional
            Importances of a role's values as in ``quantize``, by role: [K] for all experts, [E, K]
            for each, or [E, rows, K], where E and rows may be 1. K is H for 'gate' and 'up', I for
            'down'; f32, f16 or bf16. Only for roles that are encoded, in types that take them.
        biases : dict, optional
            Arrays by role, [E, I] for 'gate' and 'up', [E, H] for 'down'; f32, f16 or bf16.
        scales : dict, optional
            Arrays [E] by role, factors of the products.
        device : str
            'cpu', 'cuda:0' or 'metal'.
        layout : str
            'auto' or 'file', as in ``load_from_gguf``.

        progress : callable or bool, optional
            As in ``load_from_gguf``.

        Returns
        -------
        ExpertStack

        Raises
        ------
        ShapeError, DTypeError
            An array does not fit; the message names it.
        ConfigError
            An unknown role or type, a value that the type cannot hold or an importance below 0,
            with its position; ``weights`` of a role that is not encoded.
        UnsupportedError
            A type without an encoder, or ``weights`` for a type that takes none.
        DeviceError, OutOfMemoryError
            The device is absent or full.
        OperationCancelled
            The progress callback returned False.
        """

    @staticmethod
    def from_encoded(
        gate: _Encoded | None,
        up: _Encoded,
        down: _Encoded,
        *,
        biases: _ByRole = None,
        scales: _ByRole = None,
        device: str = "cpu",
        layout: _Layout = "auto",
    ) -> ExpertStack:
        """Take encoded bytes, as ``encoded`` and ``testing.quantize`` give them.

        Parameters
        ----------
        gate, up, down : tuple
            (array [E, rows, bytes of a row], type name) of each role, or (bytes, type name,
            (E, rows, cols)); gate is None for ungated experts.
        biases, scales : dict, optional
            As in ``from_dense_stacks``.
        device : str
            'cpu', 'cuda:0' or 'metal'.
        layout : str
            'file' keeps the arrays where they are; 'auto' takes what the backend runs fastest.

        Returns
        -------
        ExpertStack

        Raises
        ------
        ShapeError, ConfigError, DTypeError, UnsupportedError
            Sizes, a name, or a type that does not fit; E4M3 codes of NaN.

        Examples
        --------
        >>> import moesaic as mo
        >>> _ = mo.testing.write_moe_gguf("model.gguf")  # a small model with random weights
        >>> stack = mo.ExpertStack.open_and_load("model.gguf", 0)
        >>> roles = [(stack.encoded(role), stack.quants[role]) for role in stack.quants]
        >>> mo.ExpertStack.from_encoded(*roles, biases=stack.biases, scales=stack.scales).quants
        {'gate': 'Q4_K', 'up': 'Q4_K', 'down': 'Q6_K'}
        """

    @staticmethod
    def load_from_gguf(
        file: _GgufSource,
        layer: int,
        dequantize: _Dense | None = None,
        *,
        experts: _ExpertIds | None = None,
        device: str = "cpu",
        layout: _Layout = "auto",
        weight_cache: _WeightCache = False,
        progress: _Progress = None,
    ) -> ExpertStack:
        """Load the experts of one layer of a GGUF file.

        Parameters
        ----------
        file : GgufFile or path
            The model. A path is opened for this call.
        layer : int
            Block number; ``GgufFile.moe_layers`` lists those with experts.
        dequantize : str, optional
            'f32', 'f16' or 'bf16' asks for dense weights of that type.
        experts : sequence of int, range or int array [n], optional
            The experts to read and keep, by their ids in the file, which stay their ids. None: all.
        device : str
            'cpu', 'cuda:0' or 'metal'.
        layout : str
            'auto' takes what the backend runs fastest; 'file' keeps the stored bytes without a
            copy: the process ends with SIGBUS when such a file is truncated while it is used.
        weight_cache : bool or path-like
            Where repacked weights are kept, for the next start and for other processes, which map
            them from there. True: in a folder beside the file, 'model.gguf.panels'. A path: in a
            folder of that name there. False: nowhere.
        progress : callable or bool, optional
            Called with a ``Progress``; may return False to stop. True shows a tqdm bar.

        Returns
        -------
        ExpertStack

        Raises
        ------
        FileNotFoundError, OSError
            ``file`` is a path that is absent or cannot be read, or ``weight_cache`` a place that
            cannot be written, or a full disk.
        FormatError
            Missing or inconsistent tensors, or a file that became shorter.
        ShapeError
            ``experts`` that are not there or named twice.
        UnsupportedError
            A weight type without a decoder or kernels, or ``weight_cache`` for another device.
        ConfigError
            ``weight_cache`` with ``dequantize``, with ``layout='file'``, or of a file that was
            opened without mmap.
        DeviceError
            The file is closed, or the device absent.
        OperationCancelled
            ``progress`` returned False.
        OutOfMemoryError
            The weights do not fit.
        """

    @staticmethod
    def open_and_load(
        path: _Path,
        layer: int,
        dequantize: _Dense | None = None,
        *,
        experts: _ExpertIds | None = None,
        device: str = "cpu",
        layout: _Layout = "auto",
        weight_cache: _WeightCache = False,
        progress: _Progress = None,
    ) -> ExpertStack:
        """Open a GGUF file and load the experts of one layer.

        Parameters
        ----------
        path : str or path-like
            The file, or one of its shards.
        layer, dequantize, experts, device, layout, weight_cache, progress
            As in ``load_from_gguf``.

        Returns
        -------
        ExpertStack
            It keeps the file open while it reads from there.

        Raises
        ------
        FileNotFoundError, OSError
            The file is absent or cannot be read.
        FormatError, UnsupportedError, ConfigError, DeviceError
            As in ``load_from_gguf``.
        OperationCancelled, OutOfMemoryError
            As in ``load_from_gguf``.
        """

    @staticmethod
    def from_marlin(
        gate_up: MarlinExpertStack,
        down: MarlinExpertStack,
        *,
        biases: _ByRole = None,
        scales: _ByRole = None,
        device: str = "cpu",
    ) -> ExpertStack:
        """Make a layer's experts of two INT4 stacks, whose memory it shares.

        Parameters
        ----------
        gate_up : MarlinExpertStack
            k = H and n_per_expert = 2I, with columns [gate | up].
        down : MarlinExpertStack
            k = I and n_per_expert = H.
        biases, scales : dict, optional
            As in ``from_dense_stacks``.
        device : str
            'cpu' or 'cuda:0'.

        Returns
        -------
        ExpertStack

        Raises
        ------
        ShapeError
            The stacks do not fit each other.
        DeviceError, UnsupportedError
            The device is absent or has no kernels for them.
        """

    @staticmethod
    def load_from_safetensors(
        path: _Path,
        layer: int,
        dequantize: _Dense | None = None,
        *,
        prefix: str | None = None,
        quant: str | Mapping[_Role, str] | None = None,
        experts: _ExpertIds | None = None,
        device: str = "cpu",
        weight_cache: _WeightCache = False,
        progress: _Progress = None,
    ) -> ExpertStack:
        """Load the experts of one layer of a Hugging Face checkpoint, fused or one by one.

        Formats: F32, F16, BF16; FP8, on the CPU kept as 'E4M3' where blocks of 128 columns fit
        its scales, else decoded to BF16, and exactly with ``dequantize='f32'``; MXFP4, NVFP4 and
        symmetric INT4 of groups of 32, repacked without loss; INT4 of GPTQ, AWQ and
        compressed-tensors. Experts come one after another, so that a load needs little more memory
        than its result.

        Parameters
        ----------
        path : str or path-like
            A folder, a .safetensors file, or its index file.
        layer : int
            Number of the layer.
        dequantize : str, optional
            'f32', 'f16' or 'bf16' asks for dense weights of that type.
        prefix : str, optional
            Of which part of the model, where several have a layer of this number: the beginning of
            its names, as 'talker', 'eagle' or 'mtp'. None: the model, without what drafts for it.
        quant : str or dict, optional
            Types to encode roles in, such as 'Q4_K' or ``{'gate': 'Q4_K', 'up': 'Q4_K', 'down':
            'Q6_K'}``, expert by expert, so that no more memory is needed than for the result. What
            is left out stays as it is there. INT4 has types for all roles or for none.
        experts : sequence of int, range or int array [n], optional
            The experts to read and keep, as in ``load_from_gguf``.
        device : str
            'cpu', 'cuda:0' or 'metal'.
        weight_cache : bool or path-like
            Where repacked weights are kept, for the next start and for other processes, which map
            them from there and read nothing else of the experts but scales and biases. True: in the
            checkpoint's folder, in 'moesaic.panels'. A path: in a folder of the checkpoint's name
            there, 'NAME.panels'. False: nowhere.
        progress : callable or bool, optional
            As in ``load_from_gguf``.

        Returns
        -------
        ExpertStack

        Raises
        ------
        FileNotFoundError, OSError
            A file is absent or cannot be read, or ``weight_cache`` is a place that cannot be
            written, or a full disk.
        FormatError
            A tensor is missing or does not fit; the message names it.
        UnsupportedError
            A format that is missing here, ``weight_cache`` for another device or for experts that
            stay INT4, or two types in ``quant`` for gate and up that are in one tensor.
        ConfigError
            An unknown type, or ``weight_cache`` or ``quant`` with ``dequantize``.
        ShapeError
            A type in ``quant`` whose blocks do not fit, or ``experts`` that are not there or named
            twice.
        OperationCancelled, OutOfMemoryError
            As in ``load_from_gguf``.
        """

    def marlin(self, role: Literal["gate_up", "gate", "up", "down"]) -> MarlinExpertStack | None:
        """Return the INT4 stack of a role; None for other kinds, and where experts are left out.

        Parameters
        ----------
        role : str
            'gate_up' (or 'gate', or 'up') or 'down'.

        Returns
        -------
        MarlinExpertStack or None

        Raises
        ------
        ConfigError
            An unknown role.
        """

    @property
    def num_experts(self) -> int:
        """E."""

    @property
    def hidden_size(self) -> int:
        """H."""

    @property
    def intermediate_size(self) -> int:
        """I."""

    @property
    def experts(self) -> list[int]:
        """The ids of the experts in memory, ascending: all, or those that the load was asked for.

        Whatever needs the weights of another raises DeviceError (products and layers) or
        UnsupportedError (``dequantize``, ``encoded``, edits).
        """

    @property
    def kind(self) -> Literal["stacked", "per_expert", "marlin"]:
        """How the matrices lie in memory."""

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""

    @property
    def quants(self) -> dict[_Role, str]:
        """Element type in memory by role, as ggml spells it."""

    @property
    def nbytes(self) -> int:
        """Bytes of all roles of the experts in memory."""

    @property
    def bytes_per_expert(self) -> int:
        """Bytes that one token reads per expert."""

    @property
    def report(self) -> LoadReport:
        """What the load kept, repacked or dequantised, and why."""

    @property
    def biases(self) -> dict[_Role, _F32]:
        """The bias of each role that has one: f32 [E, I], for down [E, H]; read-only."""

    @property
    def scales(self) -> dict[_Role, _F32]:
        """The factors of each role's products, where there are some: f32 [E], read-only."""

    def encoded(self, role: _Role, expert: int | None = None) -> npt.NDArray[np.uint8]:
        """Return the bytes of a role as a file holds them, of type ``quants[role]``.

        What a load repacked is put back, bit by bit. Biases and scales are not in them.

        Parameters
        ----------
        role : str
            'gate', 'up' or 'down'.
        expert : int, optional
            0 to E - 1; None: all of them.

        Returns
        -------
        uint8 array [E, rows, bytes of a row], or [rows, bytes of a row] of one expert
            A copy; gate and up have I rows of H weights, down H rows of I.

        Raises
        ------
        UnsupportedError
            Weights on a device, or INT4, whose groups ``marlin(role)`` unpacks.
        ShapeError
            No such expert, or the gate of ungated experts.
        ConfigError
            An unknown role.
        """

    def dequantize(self, role: _Role, expert: int | None = None) -> _F32:
        """Return the matrices of a role as f32, times the scales where it has some.

        A bias is no part of a matrix; ``biases`` has it.

        Parameters
        ----------
        role : str
            'gate', 'up' or 'down'.
        expert : int, optional
            0 to E - 1; None: all of them.

        Returns
        -------
        f32 array
            [I, H] for gate and up, [H, I] for down; with a leading E for all experts.

        Raises
        ------
        ShapeError
            No such expert, or the gate of ungated experts.
        ConfigError
            An unknown role.
        UnsupportedError
            Weights on a device.
        """

    def select(self, ids: _ExpertIds) -> ExpertStack:
        """Return a stack of some experts, in the order of ``ids``.

        Weights are shared with this stack, not copied, so that its memory stays, with the experts
        that are left out; one made anew by ``from_encoded`` has its own. Types, biases, scales and
        deltas stay as they are. INT4 experts run on, without their ``marlin``.

        Parameters
        ----------
        ids : sequence of int, or int array [n]
            Experts of this stack; one may come more than once.

        Returns
        -------
        ExpertStack
            Its expert i is ``ids[i]`` of this one.

        Raises
        ------
        ShapeError
            No ids, or no such expert.
        UnsupportedError
            A stack on a device.
        """

    def permute(self, order: _ExpertIds) -> ExpertStack:
        """Return the experts in another order; as ``select``, but with each expert once.

        Parameters
        ----------
        order : sequence of int, or int array [E]
            Expert i of the result is ``order[i]`` of this stack.

        Returns
        -------
        ExpertStack

        Raises
        ------
        ShapeError
            Not each expert once.
        UnsupportedError
            A stack on a device.
        """

    @staticmethod
    def concat(stacks: Sequence[ExpertStack]) -> ExpertStack:
        """Return the experts of several stacks as one, those of the first stack first.

        Weights are shared with the stacks. Where only some have biases or scales, the experts of
        the others get zeros or ones, which change nothing.

        Parameters
        ----------
        stacks : sequence of ExpertStack
            Of one H and I, with each role of one type and layout.

        Returns
        -------
        ExpertStack

        Raises
        ------
        ShapeError
            No stacks, or sizes that differ.
        DTypeError
            A role in several types.
        UnsupportedError
            Layouts that differ, or a stack on a device.
        """

    def with_expert(
        self,
        expert: int,
        *,
        gate: _AnyArray | tuple[_AnyArray, str] | None = None,
        up: _AnyArray | tuple[_AnyArray, str] | None = None,
        down: _AnyArray | tuple[_AnyArray, str] | None = None,
        biases: _ByRole = None,
        scales: Mapping[_Role, float] | None = None,
    ) -> ExpertStack:
        """Return the stack with other weights in one expert; the other experts are shared.

        What is not given stays: matrices bit by bit, biases, scales and deltas too.

        Parameters
        ----------
        expert : int
            0 to E - 1.
        gate, up, down : array [rows, cols] or tuple, optional
            The matrix as ``dequantize`` gives it, f32, f16 or bf16, which is encoded in the type
            of the role; a scale that stays is taken out of it first. Or (bytes, type), encoded in
            that type already, beside the scale.
        biases : dict, optional
            Arrays [rows] by role. In a stack without biases the other experts get zeros.
        scales : dict, optional
            Numbers by role. In a stack without scales the other experts get a 1.

        Returns
        -------
        ExpertStack

        Raises
        ------
        ShapeError, DTypeError, ConfigError
            No such expert or role, or what does not fit it.
        UnsupportedError
            A type without an encoder, INT4 experts, or a stack on a device.
        """

    @property
    def deltas(self) -> dict[_Role, tuple[_F32, _F32, float]]:
        """The low-rank deltas by role: (A [E, r, cols], B [E, rows, r], scale), f32, read-only."""

    def with_deltas(self, deltas: Mapping[_Role, _Delta | None] | None) -> ExpertStack:
        """Return the stack with low-rank deltas beside its weights, which stay as they are.

        The product of expert e with a role is y = (W x) * scale_e + bias_e + scale * B[e] (A[e] x),
        with the sums of the delta in f32. The CPU alone runs them.

        Parameters
        ----------
        deltas : dict
            (A [E, r, cols], B [E, rows, r]) or (A, B, scale) by role, in f32, f16 or bf16; scale
            is 1 where it is not given. They replace those that the stack has; empty or None:
            without deltas.

        Returns
        -------
        ExpertStack
            Its weights are shared with this one.

        Raises
        ------
        ShapeError, DTypeError, ConfigError
            A delta that does not fit, or an unknown role.
        UnsupportedError
            A stack on a device.
        """

    def bake(
        self, quant: str | Mapping[_Role, str] | None = None, *, progress: _Progress = None
    ) -> ExpertStack:
        """Return the stack with its deltas added to the matrices, which are encoded again.

        Roles without a delta are shared with this stack.

        Parameters
        ----------
        quant : str or dict, optional
            The type to encode in, for all roles with a delta or by role. None: that of the role.
        progress : callable or bool, optional
            As in ``load_from_gguf``.

        Returns
        -------
        ExpertStack

        Raises
        ------
        ConfigError
            An unknown type or role.
        UnsupportedError
            A type without an encoder, or a stack on a device.
        ShapeError
            A type whose blocks do not fit the columns.
        OperationCancelled, OutOfMemoryError
            As in ``load_from_gguf``.
        """

    @overload
    def gemv_gate(
        self,
        x: _Numpy,
        ids: _AnyArray,
        *,
        out: _AnyArray | None = None,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> _F32:
        """Multiply x with the gate matrices of the experts ``ids``.

        Parameters
        ----------
        x : array [H], [..., H] or [..., k, H]
            f32, f16 or bf16, on the device of the stack.
        ids : int32 or int64 array [k] or [..., k]
            Experts; -1 writes zeros. On a GPU int32, and there.
        out : f32 array, optional
            Written to and returned.
        precision : str, optional
            'exact' or 'fast'; None and 'auto' leave the choice to the tuning.
        stream : object, optional
            CUDA stream that the call joins; None: the current one of the package of ``x``. The
            call waits for its launches.

        Returns
        -------
        f32 array [k, I] or [..., k, I]
            ``out``, or a new array of the kind of ``x``.

        Raises
        ------
        ShapeError
            Sizes or ids that do not fit, or experts without a gate.
        DTypeError, DeviceError
            An array of another type, or elsewhere.
        CaptureError
            A graph is being recorded.
        """

    @overload
    def gemv_gate(
        self,
        x: _A,
        ids: _AnyArray,
        *,
        out: _AnyArray | None = None,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> _A: ...
    @overload
    def gemv_up(
        self,
        x: _Numpy,
        ids: _AnyArray,
        *,
        out: _AnyArray | None = None,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> _F32:
        """Multiply x with the up matrices of the experts ``ids``.

        Parameters
        ----------
        x, ids, out, precision, stream
            As in ``gemv_gate``.

        Returns
        -------
        f32 array [k, I] or [T, k, I]

        Raises
        ------
        ShapeError, DTypeError, DeviceError, CaptureError
            As in ``gemv_gate``.
        """

    @overload
    def gemv_up(
        self,
        x: _A,
        ids: _AnyArray,
        *,
        out: _AnyArray | None = None,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> _A: ...
    @overload
    def gemv_gate_up_silu(
        self,
        x: _Numpy,
        ids: _AnyArray,
        *,
        out: _AnyArray | None = None,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> _F32:
        """Return silu(gate x) * up x for the experts ``ids``.

        Parameters
        ----------
        x, ids, out, precision, stream
            As in ``gemv_gate``.

        Returns
        -------
        f32 array [k, I] or [T, k, I]

        Raises
        ------
        ShapeError, DTypeError, DeviceError, CaptureError
            As in ``gemv_gate``.
        """

    @overload
    def gemv_gate_up_silu(
        self,
        x: _A,
        ids: _AnyArray,
        *,
        out: _AnyArray | None = None,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> _A: ...
    @overload
    def gemv_down(
        self,
        h: _Numpy,
        ids: _AnyArray,
        *,
        out: _AnyArray | None = None,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> _F32:
        """Multiply one row per slot with the down matrices of the experts ``ids``.

        Parameters
        ----------
        h : array [k, I] or [T, k, I]
            f32, f16 or bf16, on the device of the stack.
        ids, out, precision, stream
            As in ``gemv_gate``.

        Returns
        -------
        f32 array [k, H] or [T, k, H]

        Raises
        ------
        ShapeError, DTypeError, DeviceError, CaptureError
            As in ``gemv_gate``.
        """

    @overload
    def gemv_down(
        self,
        h: _A,
        ids: _AnyArray,
        *,
        out: _AnyArray | None = None,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> _A: ...
    @overload
    def gemm_gate(
        self,
        x: _Numpy,
        plan: BucketPlan,
        *,
        out: _AnyArray | None = None,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> _F32:
        """Multiply each token with the gate matrices of its experts.

        Parameters
        ----------
        x : array [..., H]
            f32, f16 or bf16, on the device of the stack.
        plan : BucketPlan
            Which experts each token goes to. A GPU gets a copy of it.
        out, precision, stream
            As in ``gemv_gate``.

        Returns
        -------
        f32 array [P, I]
            In pair order.

        Raises
        ------
        ShapeError, DTypeError, DeviceError, CaptureError
            As in ``gemv_gate``.
        """

    @overload
    def gemm_gate(
        self,
        x: _A,
        plan: BucketPlan,
        *,
        out: _AnyArray | None = None,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> _A: ...
    @overload
    def gemm_up(
        self,
        x: _Numpy,
        plan: BucketPlan,
        *,
        out: _AnyArray | None = None,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> _F32:
        """Multiply each token with the up matrices of its experts.

        Parameters
        ----------
        x, plan, out, precision, stream
            As in ``gemm_gate``.

        Returns
        -------
        f32 array [P, I]
            In pair order.

        Raises
        ------
        ShapeError, DTypeError, DeviceError, CaptureError
            As in ``gemv_gate``.
        """

    @overload
    def gemm_up(
        self,
        x: _A,
        plan: BucketPlan,
        *,
        out: _AnyArray | None = None,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> _A: ...
    @overload
    def gemm_down(
        self,
        h: _Numpy,
        plan: BucketPlan,
        *,
        out: _AnyArray | None = None,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> _F32:
        """Multiply one row per pair with the down matrix of its expert.

        Parameters
        ----------
        h : array [P, I]
            f32, f16 or bf16, in pair order, on the device of the stack.
        plan, out, precision, stream
            As in ``gemm_gate``.

        Returns
        -------
        f32 array [P, H]
            In pair order.

        Raises
        ------
        ShapeError, DTypeError, DeviceError, CaptureError
            As in ``gemv_gate``.
        """

    @overload
    def gemm_down(
        self,
        h: _A,
        plan: BucketPlan,
        *,
        out: _AnyArray | None = None,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> _A: ...
    def __copy__(self) -> Self:
        """Return the stack itself, which nothing changes."""

    def __deepcopy__(self, memo: dict[int, Any], /) -> Self:
        """Return the stack itself."""

    def __repr__(self) -> str: ...

@type_check_only
class _MoeLayerParts(TypedDict, total=False):
    stack: ExpertStack
    config: MoeConfig
    router_weight: _AnyArray | None
    shared: SharedExperts | ExpertStack | None
    shared_gate: _AnyArray | None
    latent: tuple[_AnyArray, _AnyArray] | ExpertStack | None
    latent_norm: _AnyArray | None
    input_norm: _AnyArray | None
    router_norm: _AnyArray | None
    token_experts: _AnyArray | None
    precision: _Precision

@final
class SharedExperts:
    """Experts that see every token: a stack of one expert, perhaps scaled by the sigmoid of a gate.

    Several shared experts are one, whose I is the sum of theirs.

    Parameters
    ----------
    stack : ExpertStack
        One expert.
    gate : array [H], optional
        Weight of the sigmoid; f32, f16 or bf16.
    scale : float
        The part of ``MoeConfig.shared_scale`` that the scale of the stack's down role holds
        already, as it does in ``MoeLayer.shared``.

    Raises
    ------
    ShapeError, DTypeError
        A gate that does not fit.
    """

    def __init__(
        self, stack: ExpertStack, gate: _AnyArray | None = None, *, scale: float = 1.0
    ) -> None: ...
    @property
    def stack(self) -> ExpertStack:
        """The experts, as one."""

    @property
    def gate(self) -> _F32 | None:
        """Weight of the sigmoid, f32 [H], read-only; None without one."""

    @property
    def scale(self) -> float:
        """The part of the config's shared_scale that the stack holds already."""

    def __repr__(self) -> str: ...

@final
class QuantMatrix:
    """One matrix of weights W [N, K] outside of any expert, kept in its own type.

    What an attention or output projection is: y = x @ W.T * scale + bias, by the kernels that run
    experts, on the CPU. Calls from several threads at once are fine. A matrix that came from a file
    pickles as the way to read it again.

    Examples
    --------
    >>> import moesaic as mo, numpy as np
    >>> w = np.random.default_rng(0).standard_normal((64, 256), np.float32)  # [N, K]
    >>> matrix = mo.QuantMatrix.from_dense(w, "Q8_0")
    >>> matrix(np.ones((2, 3, 256), np.float32)).shape
    (2, 3, 64)
    """

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @staticmethod
    def from_dense(
        values: _AnyArray,
        quant: str | None = None,
        weights: _AnyArray | None = None,
        *,
        bias: _AnyArray | None = None,
        device: str = "cpu",
        layout: _Layout = "auto",
        progress: _Progress = None,
    ) -> QuantMatrix:
        """Copy a dense matrix, or encode it.

        Parameters
        ----------
        values : array [N, K]
            f32, f16 or bf16.
        quant : str, optional
            The type to encode in, such as 'Q4_K'; None keeps the type of the values.
        weights : array [K] or [N, K], optional
            What the squared error of each value counts, as in ``quantize``.
        bias : array [N], optional
            f32, f16 or bf16; added to every row of the result.
        device : str
            'cpu'. Matrices on their own run on no other device yet.
        layout : str
            'auto' or 'file', as in ``from_gguf``.
        progress : callable or bool, optional
            As in ``from_gguf``.

        Returns
        -------
        QuantMatrix

        Raises
        ------
        ShapeError, DTypeError
            An array does not fit; the message names it.
        ConfigError
            An unknown type, or a value that the type cannot hold, with its position.
        UnsupportedError
            A type without an encoder, ``weights`` for a type that takes none, or another device.
        DeviceError, OutOfMemoryError
            The device is absent, or the memory full.
        OperationCancelled
            The progress callback returned False.
        """

    @staticmethod
    def from_encoded(
        data: _AnyArray,
        quant: str,
        shape: tuple[int, int] | None = None,
        *,
        scale: float = 1.0,
        bias: _AnyArray | None = None,
        device: str = "cpu",
        layout: _Layout = "auto",
    ) -> QuantMatrix:
        """Take encoded bytes, as ``encoded`` and ``quantize`` give them.

        Parameters
        ----------
        data : array [N, row bytes]
            Rows of whole blocks one behind the other; bytes of any shape with ``shape``.
        quant : str
            Their type, such as 'Q4_K'.
        shape : tuple of int, optional
            (N, K); None: as the rows of ``data`` have it.
        scale : float
            Factor of the products.
        bias : array [N], optional
            f32, f16 or bf16; added to every row of the result.
        device : str
            'cpu', as in ``from_dense``.
        layout : str
            'file' keeps the array where it is; 'auto' takes what runs fastest.

        Returns
        -------
        QuantMatrix

        Raises
        ------
        ShapeError, ConfigError, DTypeError, UnsupportedError
            Sizes, a name, a type or a device that does not fit; E4M3 codes of NaN.
        DeviceError, OutOfMemoryError
            The device is absent, or the memory full.

        Examples
        --------
        >>> import moesaic as mo, numpy as np
        >>> data = mo.quantize(np.ones((4, 32), np.float32), "Q8_0")
        >>> mo.QuantMatrix.from_encoded(data, "Q8_0")
        moesaic.QuantMatrix([4, 32], Q8_0, 136 bytes)
        """

    @staticmethod
    def from_gguf(
        file: _GgufSource,
        name: str,
        dequantize: _Dense | None = None,
        *,
        bias: str | None = None,
        device: str = "cpu",
        layout: _Layout = "auto",
        weight_cache: _WeightCache = False,
        progress: _Progress = None,
    ) -> QuantMatrix:
        """Load one tensor of a GGUF file.

        Parameters
        ----------
        file : GgufFile or path
            The model. A path is opened for this call.
        name : str
            A tensor [N, K], such as 'blk.0.attn_q.weight' or 'output.weight', or [K], which is one
            row. A factor that the file keeps beside it ('blk.0.attn_q.scale') is applied.
        dequantize : str, optional
            'f32', 'f16' or 'bf16' asks for dense weights of that type.
        bias : str, optional
            A tensor [N] to add to every row of the result, such as 'blk.0.attn_q.bias'.
        device : str
            'cpu', as in ``from_dense``.
        layout : str
            'auto' takes what runs fastest; 'file' keeps the stored bytes without a copy: the
            process ends with SIGBUS when such a file is truncated while it is used.
        weight_cache : bool or path-like
            As in ``ExpertStack.load_from_gguf``.
        progress : callable or bool, optional
            Called with a ``Progress``; may return False to stop. True shows a tqdm bar.

        Returns
        -------
        QuantMatrix

        Raises
        ------
        FileNotFoundError, OSError
            ``file`` is a path that is absent or cannot be read, or ``weight_cache`` a place that
            cannot be written, or a full disk.
        FormatError
            A tensor that is missing, or no matrix, or a file that became shorter.
        UnsupportedError
            A weight type without a decoder or kernels, or another device.
        ConfigError
            As in ``ExpertStack.load_from_gguf``.
        DeviceError
            The file is closed, or the device absent.
        OperationCancelled
            ``progress`` returned False.
        OutOfMemoryError
            The weights do not fit.

        Examples
        --------
        >>> import moesaic as mo
        >>> _ = mo.testing.write_moe_gguf("model.gguf")  # a small model with random weights
        >>> mo.QuantMatrix.from_gguf("model.gguf", "blk.0.ffn_gate_inp.weight")
        moesaic.QuantMatrix([8, 256], F32, 8192 bytes)
        """

    def __call__(
        self,
        x: _A,
        *,
        out: _A | None = None,
        workspace: Workspace | None = None,
        accumulate: bool = False,
        precision: _Precision | None = None,
    ) -> _A:
        """Return x @ W.T * scale + bias.

        A row of the result does not depend on the rows beside it but for the precision, which is
        'exact' for one or two rows and 'fast' for more, unless it is asked for. After an error
        nothing was written to ``out``.

        Parameters
        ----------
        x : array [..., K]
            f32, f16 or bf16.
        out : array [..., N], optional
            f32, f16 or bf16; written to and returned.
        workspace : Workspace, optional
            Scratch memory; None: one from a cache.
        accumulate : bool
            Whether to add to ``out`` in place of overwriting it.
        precision : str, optional
            'exact' or 'fast'; None and 'auto' leave the choice to the tuning.

        Returns
        -------
        array [..., N]
            ``out``, or a new array of the element type and kind of ``x``; sums are f32, rounded
            once.

        Raises
        ------
        ShapeError, DTypeError
            An array does not fit; the message names it.
        DeviceError
            An array lies elsewhere.
        WorkspaceError
            The workspace is too small or in use.
        ConfigError
            ``accumulate`` without ``out``, a read-only ``out``, or an unknown precision.
        UnsupportedError
            The tuning's ``strict`` and a type without a kernel of its own.
        OutOfMemoryError
            The memory is full.
        """

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""

    @property
    def quant(self) -> str:
        """Type of the weights, such as 'Q4_K'."""

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, without bias."""

    @property
    def layout(self) -> Literal["rows", "panels"]:
        """How the weights lie: as a file has them, or repacked in panels of 16 rows."""

    @property
    def device(self) -> str:
        """Where the weights lie: 'cpu'."""

    @property
    def bias(self) -> _F32 | None:
        """The bias, f32 [N], read-only; None without one."""

    @property
    def scale(self) -> float:
        """Factor of the products, 1.0 where there is none."""

    def dequantize(self) -> _F32:
        """Return the weights as f32 [N, K], times the scale.

        Raises
        ------
        OutOfMemoryError
            The memory is full.
        """

    def encoded(self) -> npt.NDArray[np.uint8]:
        """Return the stored rows, uint8 [N, row bytes], whatever the layout.

        Raises
        ------
        OutOfMemoryError
            The memory is full.
        """

    def __copy__(self) -> Self:
        """Return the same matrix; it never changes."""

    def __deepcopy__(self, memo: dict[int, Any], /) -> Self:
        """Return the same matrix; it never changes."""

    def __repr__(self) -> str: ...

@final
class MoeLayer:
    """A whole MoE layer: router, experts and shared experts, as the model defines them.

    A context manager. Calls from several threads at once are fine. A layer that came from files
    pickles as the way to read it again.

    Parameters
    ----------
    stack : ExpertStack
        The routed experts.
    config : MoeConfig
        Facts of the layer.
    router_weight : array [E, H], optional
        f32, f16 or bf16, as all arrays here; E is config.router.num_experts. None: every call
        brings logits or a routing.
    shared : SharedExperts or ExpertStack, optional
        The shared experts; a stack has one expert.
    shared_gate : array [H], optional
        Weight of the sigmoid that scales the shared experts, beside a stack.
    latent : tuple of array or ExpertStack, optional
        Projections (down [L, H], up [H, L]) of a layer with a latent_size L; or a stack of one
        ungated expert of intermediate size L, whose up and down matrices they are.
    latent_norm : array [L], optional
        Weight of the RMS norm before the projection up.
    input_norm : array [H], optional
        Weight of the RMS norm before the experts.
    router_norm : array [H], optional
        Weight of the RMS norm before the router.
    token_experts : int array [vocab_size, top_k], optional
        The experts of each token id.
    precision : str
        Default of calls: 'auto', 'exact' or 'fast'.

    Raises
    ------
    ShapeError
        The parts disagree with the config.
    ConfigError, DTypeError
        Parts that contradict each other, or arrays of another type.

    Examples
    --------
    >>> import moesaic as mo, numpy as np
    >>> _ = mo.testing.write_moe_gguf("model.gguf")  # a small model with random weights
    >>> x = np.ones((3, 256), np.float32)  # [T, H]
    >>> with mo.GgufFile("model.gguf") as f, mo.MoeLayer.from_gguf(f, 0) as layer:
    ...     y, routing = layer(x, return_routing=True)
    >>> y.shape, routing.topk_ids.shape
    ((3, 256), (3, 2))
    """

    def __init__(
        self,
        stack: ExpertStack,
        config: MoeConfig,
        router_weight: _AnyArray | None = None,
        *,
        shared: SharedExperts | ExpertStack | None = None,
        shared_gate: _AnyArray | None = None,
        latent: tuple[_AnyArray, _AnyArray] | ExpertStack | None = None,
        latent_norm: _AnyArray | None = None,
        input_norm: _AnyArray | None = None,
        router_norm: _AnyArray | None = None,
        token_experts: _AnyArray | None = None,
        precision: _Precision = "auto",
    ) -> None: ...
    @staticmethod
    def from_gguf(
        file: _GgufSource,
        layer: int,
        *,
        config: MoeConfig | None = None,
        top_k: int | None = None,
        experts: _ExpertIds | None = None,
        device: str = "cpu",
        layout: _Layout = "auto",
        precision: _Precision = "auto",
        weight_cache: _WeightCache = False,
        progress: _Progress = None,
    ) -> MoeLayer:
        """Load one layer of a GGUF file, with its router and shared experts.

        Every tensor of the layer is used or named in a FormatError; harmless ones
        (``*.input_scale``) and those of the rest of the block are passed by.

        Parameters
        ----------
        file : GgufFile or path
            The model. A path is opened for this call.
        layer : int
            Block number; ``GgufFile.moe_layers`` lists those with experts.
        config : MoeConfig, optional
            The layer's facts, for an architecture without a preset or to try others. Biases of the
            router that it leaves empty come from the file. None: from the metadata.
        top_k : int, optional
            Experts per token, instead of the config's.
        experts : sequence of int, range or int array [n], optional
            The routed experts to read and keep, by their ids in the file, which stay their ids; no
            byte of the others is read. The rest of the layer is whole. A call that needs another
            expert is a DeviceError before anything is computed. None: all.
        device : str
            'cpu', 'cuda:0' or 'metal'; ``backends`` lists those that are here.
        layout : str
            'auto' takes what the backend runs fastest; 'file' keeps the stored bytes without a
            copy: the process ends with SIGBUS when such a file is truncated while it is used.
        precision : str
            Default of calls: 'auto', 'exact' or 'fast'.
        weight_cache : bool or path-like
            Where repacked weights are kept, for the next start and for other processes, which map
            them from there. True: in a folder beside the file, 'model.gguf.panels'. A path: in a
            folder of that name there. False: nowhere.
        progress : callable or bool, optional
            Called with a ``Progress``; may return False to stop. True shows a tqdm bar.

        Returns
        -------
        MoeLayer

        Raises
        ------
        FileNotFoundError, OSError
            ``file`` is a path that is absent or cannot be read, or ``weight_cache`` a place that
            cannot be written, or a full disk.
        UnsupportedError
            An architecture, part or weight type that is missing here, or ``weight_cache`` for
            another device.
        FormatError
            Missing or inconsistent metadata or tensors.
        ConfigError
            A ``config`` with other biases than the file's, a ``top_k`` that the experts do not
            allow, or ``weight_cache`` with ``layout='file'`` or of a file that was opened without
            mmap.
        ShapeError
            A layer without experts, or ``experts`` that are not there or named twice.
        DeviceError
            The file is closed, or the device absent.
        OperationCancelled
            ``progress`` returned False.
        OutOfMemoryError
            The weights do not fit.
        """

    @staticmethod
    def from_safetensors(
        path: _Path,
        layer: int,
        dequantize: _Dense | None = None,
        *,
        prefix: str | None = None,
        config: MoeConfig | None = None,
        top_k: int | None = None,
        experts: _ExpertIds | None = None,
        device: str = "cpu",
        precision: _Precision = "auto",
        weight_cache: _WeightCache = False,
        progress: _Progress = None,
    ) -> MoeLayer:
        """Load one layer of a Hugging Face checkpoint, with its router and shared experts.

        The facts are those of its config.json (``MoeConfig.from_hf``), the formats those of
        ``ExpertStack.load_from_safetensors``. Nothing is left out silently: a tensor of the block
        that has no use here is an error.

        Parameters
        ----------
        path : str or path-like
            A folder with config.json and the tensors.
        layer : int
            Number of the layer.
        dequantize : str, optional
            'f32', 'f16' or 'bf16' asks for dense weights of that type.
        prefix : str, optional
            As in ``ExpertStack.load_from_safetensors``.
        config : MoeConfig, optional
            What the layer is, in place of what config.json says; for a model type that is unknown
            here, or without such a file.
        top_k : int, optional
            Experts per token, in place of the number in the configuration.
        experts : sequence of int, range or int array [n], optional
            The routed experts to read and keep, as in ``from_gguf``.
        device : str
            'cpu', 'cuda:0' or 'metal'.
        precision : str
            Default of calls: 'auto', 'exact' or 'fast'.
        weight_cache : bool or path-like
            Where the repacked experts and shared experts are kept, as in
            ``ExpertStack.load_from_safetensors``.
        progress : callable or bool, optional
            As in ``from_gguf``.

        Returns
        -------
        MoeLayer

        Raises
        ------
        FileNotFoundError, OSError
            A file is absent or cannot be read, or ``weight_cache`` is a place that cannot be
            written, or a full disk.
        UnsupportedError
            A model type, part, format or tensor that is missing here, or ``weight_cache`` for
            another device or for experts that stay INT4.
        FormatError
            A value or tensor is missing or does not fit; the message names it.
        ConfigError
            A ``top_k`` that the router cannot have, or ``weight_cache`` with ``dequantize``.
        ShapeError
            A layer without experts, or ``experts`` that are not there or named twice.
        DeviceError, OperationCancelled, OutOfMemoryError
            As in ``from_gguf``.
        """

    @staticmethod
    def from_store(
        store: MoeExpertStore,
        layer: int,
        pool: ExpertPool | None = None,
        on_miss: _OnMiss = "compute",
        *,
        config: MoeConfig | None = None,
        top_k: int | None = None,
        router_weight: _AnyArray | None = None,
        shared: SharedExperts | ExpertStack | None = None,
        shared_gate: _AnyArray | None = None,
        device: str = "cpu",
        precision: _Precision = "auto",
    ) -> MoeLayer:
        """Make a layer of a store, with as many experts in fast memory as the pool says.

        Its results are those of a layer with everything resident. Experts are cold until
        ``MoeExpertStore.apply`` or, with 'stage', until they are needed.

        Parameters
        ----------
        store : MoeExpertStore
            Where the experts lie.
        layer : int
            Block number in the model, as in ``from_gguf``: the ``layer_index`` of one of
            ``store.layers``.
        pool : ExpertPool, optional
            Which experts have a slot. None: all of them, loaded now.
        on_miss : str
            What a call does with an expert that has no slot: 'compute' it where it lies, 'stage'
            it to fast memory first, or raise an 'error'.
        config : MoeConfig, optional
            The layer's facts: of a store of arrays, which knows none, or instead of the metadata of
            a file, as in ``from_gguf``.
        top_k : int, optional
            Experts per token, instead of the config's.
        router_weight, shared, shared_gate
            As in the constructor; only with a ``config``. None: those of the file or checkpoint,
            where the store is of one.
        device : str
            'cpu' or 'cuda:0'.
        precision : str
            Default of calls: 'auto', 'exact' or 'fast'.

        Returns
        -------
        MoeLayer

        Raises
        ------
        ShapeError
            No such block (the message lists those there are), a pool of another size, or parts that
            disagree with the config.
        ConfigError
            Another pool already runs this layer, or arguments that contradict each other.
        UnsupportedError, DeviceError, FormatError, OSError
            The layer cannot be made on this device, or the experts not be read.
        """

    @overload
    def __call__(
        self,
        x: _A,
        router_logits: _AnyArray | None = None,
        *,
        routing: Routing | None = None,
        topk_ids: _AnyArray | None = None,
        token_ids: _AnyArray | None = None,
        router_input: _AnyArray | None = None,
        return_routing: Literal[False] = False,
        out: _A | None = None,
        workspace: Workspace | None = None,
        accumulate: bool = False,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> _A:
        """Run the layer.

        Tokens are routed by the layer's own router, by ``router_logits``, or by a ready
        ``routing``. After an error nothing was written to ``out``.

        Parameters
        ----------
        x : array [..., H]
            f32, f16 or bf16, on the device of the layer.
        router_logits : array [..., E], optional
            Logits from outside, in place of the own router's; f32, or f16 and bf16, which are
            converted.
        routing : Routing, optional
            Ready ids and weights.
        topk_ids : int array [..., top_k], optional
            The ids, where the router does not select (select_on 'given'); their weights come from
            the router. On a GPU int32, and there.
        token_ids : int array [...], optional
            Rows of the layer's table of experts, for a router that does not select. On a GPU
            int32, and there.
        router_input : array [..., H], optional
            What the own router reads in place of ``x``.
        return_routing : bool
            Whether to return the routing too.
        out : array [..., H], optional
            f32, f16 or bf16, of the shape of ``x``; written to and returned.
        workspace : Workspace, optional
            Scratch memory; None: one from a cache.
        accumulate : bool
            Whether to add to ``out`` in place of overwriting it.
        precision : str, optional
            'exact' or 'fast', before the layer's and the tuning's; None and 'auto' leave it to
            them.
        stream : object, optional
            CUDA stream that the call joins; None: the current one of the package of ``x``. Must be
            None on the CPU.

        Returns
        -------
        array [..., H]
            ``out``, or a new array of the shape, element type and kind of ``x``; with
            ``return_routing`` a tuple of it and the ``Routing``.

        Raises
        ------
        ShapeError, DTypeError
            An array does not fit; the message names it.
        DeviceError
            The layer is closed, an array lies elsewhere, or (on_miss 'error') an expert is not in
            fast memory.
        WorkspaceError
            The workspace is too small or in use.
        ConfigError
            Arguments that contradict each other, or a router without its input.
        """

    @overload
    def __call__(
        self,
        x: _A,
        router_logits: _AnyArray | None = None,
        *,
        routing: Routing | None = None,
        topk_ids: _AnyArray | None = None,
        token_ids: _AnyArray | None = None,
        router_input: _AnyArray | None = None,
        return_routing: Literal[True],
        out: _A | None = None,
        workspace: Workspace | None = None,
        accumulate: bool = False,
        precision: _Precision | None = None,
        stream: _Stream = None,
    ) -> tuple[_A, Routing]: ...
    @property
    def config(self) -> MoeConfig:
        """Facts of the layer. This and what follows raise DeviceError after ``close``."""

    @property
    def stack(self) -> ExpertStack:
        """The routed experts."""

    @property
    def report(self) -> LoadReport:
        """What the load kept, repacked or dequantised, and why."""

    @property
    def precision(self) -> _Precision:
        """Default of calls."""

    @property
    def router_weight(self) -> _F32 | None:
        """The router's weight, f32 [E, H], read-only; None for a layer without one."""

    @property
    def shared(self) -> SharedExperts | None:
        """The shared experts; None for a layer without some."""

    @property
    def latent(self) -> ExpertStack | None:
        """The projections of latent experts as a stack of one ungated expert; None without them.

        Its up matrix [L, H] leads to the experts, its down matrix [H, L] back.
        """

    @property
    def norms(self) -> dict[Literal["latent_norm", "input_norm", "router_norm"], _F32]:
        """Weights of the RMS norms that the layer has, by the constructor's names; read-only."""

    @property
    def token_experts(self) -> npt.NDArray[np.int32] | None:
        """The experts of each token id, int32 [vocab_size, top_k], read-only; None without some."""

    def route(
        self,
        x: _AnyArray,
        router_logits: _AnyArray | None = None,
        *,
        topk_ids: _AnyArray | None = None,
        token_ids: _AnyArray | None = None,
        router_input: _AnyArray | None = None,
        workspace: Workspace | None = None,
        stream: _Stream = None,
    ) -> Routing:
        """Return what the layer's router gives; a call with ``return_routing`` gives the same bits.

        With ``expert_rows`` and ``finish`` a call comes apart: experts can run in several places.
        ``finish(expert_rows(x, r), r, x)`` with ``r = route(x)`` is ``layer(x)``, bit for bit with
        a given precision or ``batch_invariant``.

        Parameters
        ----------
        x, router_logits, topk_ids, token_ids, router_input, workspace, stream
            As in a call.

        Returns
        -------
        Routing
            Ids and weights [T, top_k], T the product of the leading dimensions of ``x``.

        Raises
        ------
        ShapeError, DTypeError, DeviceError, WorkspaceError, ConfigError
            As a call.
        """

    def expert_rows(
        self,
        x: _A,
        routing: Routing,
        *,
        out: _AnyArray | None = None,
        workspace: Workspace | None = None,
        precision: _Precision | None = None,
    ) -> _A:
        """Return what the expert of each pair gives for its token, unweighted.

        Parameters
        ----------
        x : array [..., H]
            f32, f16 or bf16.
        routing : Routing
            Ids [T, top_k]; pairs with id -1 are skipped, as are those of identity experts. Its
            weights are read only where they act on the input (weight_on 'input').
        out : f32 array [P, H'], optional
            Written to and returned.
        workspace : Workspace, optional
            As in a call.
        precision : str, optional
            As in a call; 'auto' counts the pairs that are computed.

        Returns
        -------
        f32 array [P, H']
            A row for each of the P pairs that are not skipped, by token and then by slot. H' is
            the hidden size of ``stack``: that of the layer, or the latent size of latent experts.

        Raises
        ------
        ShapeError, DTypeError, WorkspaceError
            As a call.
        DeviceError
            As a call, and a routing that names an expert which the stack does not keep.
        UnsupportedError
            A layer on CUDA, whose memory the host does not read.

        Examples
        --------
        >>> import moesaic as mo, numpy as np
        >>> _ = mo.testing.write_moe_gguf("model.gguf")  # a small model with random weights
        >>> x = np.ones((3, 256), np.float32)  # [T, H]
        >>> with mo.tuning(precision="exact"), mo.MoeLayer.from_gguf("model.gguf", 0) as layer:
        ...     routing = layer.route(x)
        ...     rows = layer.expert_rows(x, routing)
        ...     same = np.array_equal(layer.finish(rows, routing, x), layer(x))
        >>> rows.shape, same
        ((6, 256), True)
        """

    def finish(
        self,
        rows: _AnyArray,
        routing: Routing,
        x: _A,
        *,
        out: _A | None = None,
        workspace: Workspace | None = None,
        accumulate: bool = False,
        precision: _Precision | None = None,
    ) -> _A:
        """Return the layer's result from the rows of its experts, wherever those were computed.

        The weighted sum of the rows in slot order, then all that a layer adds to it: projection and
        norm of latent experts, identity experts, shared experts. The routed experts' weights are
        not read, and need not be here.

        Parameters
        ----------
        rows : f32 array [P, H']
            As ``expert_rows`` gives them for this routing: for all pairs that are not skipped.
        routing : Routing
            Ids and weights [T, top_k].
        x : array [..., H]
            What the layer was given; identity and shared experts read it.
        out, workspace, accumulate, precision
            As in a call.

        Returns
        -------
        array [..., H]
            ``out``, or a new array of the shape, element type and kind of ``x``.

        Raises
        ------
        ShapeError, DTypeError, DeviceError, WorkspaceError, ConfigError
            As a call.
        UnsupportedError
            A layer on CUDA, whose memory the host does not read.
        """

    def count_usage(self, *, coactivation: bool = False) -> None:
        """Count which experts the calls of this layer compute, from zero.

        It costs a call some 10 ns a pair and a lock. Layers of a store count always, in the pool.

        Parameters
        ----------
        coactivation : bool
            Whether to count pairs of experts too, int64 [E, E].

        Raises
        ------
        UnsupportedError
            A layer of a store, or on a device.
        """

    @property
    def usage(self) -> ExpertUsage:
        """Which experts were computed since ``count_usage``; ConfigError before it.

        Of a layer of a store: what was asked of its pool.
        """

    def replace(
        self,
        *,
        drop_biases: bool = False,
        drop_scales: bool = False,
        **changes: Unpack[_MoeLayerParts],
    ) -> MoeLayer:
        """Return a layer with some parts changed, checked as a new one; weights are shared.

        Parameters
        ----------
        drop_biases : bool
            Whether another stack may lack biases that the layer has.
        drop_scales : bool
            Whether another stack may lack scales that the layer has, in roles of the same
            quantised type.
        **changes
            Parts by the names of the constructor.

        Returns
        -------
        MoeLayer

        Raises
        ------
        ConfigError
            A stack without biases or scales that the layer has; as the constructor.
        ShapeError, DTypeError
            As the constructor.
        UnsupportedError
            A layer whose experts are in a store.
        TypeError
            A name that is no part.

        Examples
        --------
        >>> import moesaic as mo
        >>> _ = mo.testing.write_moe_gguf("model.gguf")  # a small model with random weights
        >>> layer = mo.MoeLayer.from_gguf("model.gguf", 0)
        >>> louder = layer.replace(router_weight=2 * layer.router_weight)
        >>> louder.stack is layer.stack
        True
        """

    def select_experts(self, ids: _ExpertIds) -> MoeLayer:
        """Return the layer with some of its experts, in the order of ``ids``.

        The router follows: rows of its weight, its biases, the table of experts by token id.
        Identity experts stay behind the others. Weights of experts are shared.

        Parameters
        ----------
        ids : sequence of int, or int array [n]
            Experts with weights. One may come more than once: its copies have equal logits, and
            the table by token id names the first.

        Returns
        -------
        MoeLayer

        Raises
        ------
        ShapeError
            No ids, or no such expert.
        ConfigError
            Fewer experts than top_k, experts that leave their group, or one without which a token
            id has none.
        UnsupportedError
            A layer on a device, or whose experts are in a store.

        Examples
        --------
        >>> import moesaic as mo
        >>> _ = mo.testing.write_moe_gguf("model.gguf")  # a small model with random weights
        >>> mo.MoeLayer.from_gguf("model.gguf", 0).select_experts([0, 2, 3]).router_weight.shape
        (3, 256)
        """

    def permute_experts(self, order: _ExpertIds) -> MoeLayer:
        """Return the layer with its experts in another order, which only rounds its results anew.

        Where two experts are equally good for a token, the lower id is chosen, so the order can
        decide.

        Parameters
        ----------
        order : sequence of int, or int array [E]
            Expert i of the result is ``order[i]`` of this layer.

        Returns
        -------
        MoeLayer

        Raises
        ------
        ShapeError
            Not each expert once.
        ConfigError, UnsupportedError
            As in ``select_experts``.
        """

    def memory(self) -> dict[str, int]:
        """Return bytes by part: gate, up, down, router, shared, latent, other, and total."""

    def save(
        self,
        path: _Path,
        *,
        metadata: Mapping[str, Any] | None = None,
        architecture: str | None = None,
        fused: bool = False,
        overwrite: bool = False,
        progress: _Progress = None,
    ) -> None:
        """Write the layer to a GGUF file of one block, block 0.

        ``write_gguf`` writes several, and says what is written, how, and what is refused.

        Parameters
        ----------
        path : path
            The file.
        metadata : mapping, optional
            More keys of the file: bool, int, float, str or a list of one of them.
        architecture : str, optional
            A name of ``known_architectures``. None: that of the config.
        fused : bool
            Gate and up as one tensor, which has one type.
        overwrite : bool
            Whether a file that is there is replaced.
        progress : callable or bool, optional
            Called with a ``Progress``; may return False to stop. True shows a tqdm bar.

        Raises
        ------
        ConfigError
            A file that is there, or an unknown architecture.
        UnsupportedError
            What the architecture or GGUF cannot express, by name.
        OperationCancelled
            ``progress`` returned False.
        OSError
            The file cannot be written; the one that was there is as it was.

        Examples
        --------
        >>> import moesaic as mo
        >>> _ = mo.testing.write_moe_gguf("model.gguf", layers=2)
        >>> mo.MoeLayer.from_gguf("model.gguf", 1).save("layer.gguf")
        >>> mo.GgufFile("layer.gguf").moe_layers
        [0]
        """

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""

    def close(self) -> None:
        """Let go of the weights; calls under way finish first. A second call does nothing."""

    def __copy__(self) -> Self:
        """Return a layer of its own to close, over the same weights, which nothing changes."""

    def __deepcopy__(self, memo: dict[int, Any], /) -> Self:
        """Return the same as ``copy.copy``."""

    def __enter__(self) -> Self:
        """Return the layer."""

    def __exit__(self, *exc_info: object) -> None:
        """Close the layer."""

    def __repr__(self) -> str: ...

# --- experts in slow memory -------------------------------------------------------------------

@final
class RefreshPolicy:
    """When an ``ExpertPool`` asks to be refreshed; make one with the methods below."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @staticmethod
    def every_forward() -> RefreshPolicy:
        """At every forward."""

    @staticmethod
    def every_decode_steps(n: int) -> RefreshPolicy:
        """When the decode step is a multiple of ``n``, which is at least 1."""

    @staticmethod
    def every_steps(n: int) -> RefreshPolicy:
        """When the step, of whatever kind, is a multiple of ``n``, which is at least 1."""

    @staticmethod
    def manual() -> RefreshPolicy:
        """Only at a prefill block or when forced."""

    @property
    def every(self) -> Literal["forward", "decode_steps", "steps", "manual"]:
        """What is counted."""

    @property
    def steps(self) -> int:
        """The n of the step policies."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as JSON takes them."""

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> RefreshPolicy:
        """Return what ``to_dict`` gave, as it is or out of JSON.

        Parameters
        ----------
        fields : mapping
            Values by the names of the fields.

        Returns
        -------
        RefreshPolicy

        Raises
        ------
        TypeError
            A name that is no field; the message has the nearest one.
        ConfigError
            An unknown word.
        """

    def __eq__(self, other: object, /) -> bool:
        """Return whether all fields are equal."""

    def __hash__(self) -> int: ...
    def __repr__(self) -> str: ...

@final
class RefreshResult:
    """What a refresh decided; true when the pool was due."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def refreshed(self) -> bool:
        """Whether the pool was due."""

    @property
    def target(self) -> list[int]:
        """The wanted experts, best first; may be fewer than the budget."""

    @property
    def promotions(self) -> list[int]:
        """Experts that come, in the order of ``target``."""

    @property
    def demotions(self) -> list[int]:
        """Experts that leave, each for the promotion at the same index."""

    @property
    def loads(self) -> list[tuple[int, int, int]]:
        """(expert, slot in fast memory, evicted expert or -1) of each promotion."""

    @property
    def bytes(self) -> int:
        """Bytes that the promotions will move; 0 from a pool without a store."""

    def __bool__(self) -> bool:
        """Return ``refreshed``."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as JSON takes them."""

    def __eq__(self, other: object, /) -> bool:
        """Return whether all fields are equal."""

    def __hash__(self) -> int: ...
    def __repr__(self) -> str: ...

@final
class PoolStats:
    """What a pool did, cumulative; a forward counts once, not once per role."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def forwards(self) -> int:
        """Forwards of the layer."""

    @property
    def refreshes(self) -> int:
        """Placements that were decided."""

    @property
    def promotions(self) -> int:
        """Experts that got a slot."""

    @property
    def demotions(self) -> int:
        """Experts that lost theirs."""

    @property
    def hit_experts(self) -> int:
        """Distinct experts of each forward that were resident, summed over the forwards."""

    @property
    def miss_experts(self) -> int:
        """Distinct experts of each forward that were not."""

    @property
    def hit_pairs(self) -> int:
        """Pairs on experts that were resident."""

    @property
    def miss_pairs(self) -> int:
        """Pairs on experts that were not."""

    @property
    def staged(self) -> int:
        """Missing experts that were given a slot."""

    @property
    def streamed(self) -> int:
        """Missing experts that only passed through fast memory."""

    @property
    def bytes(self) -> int:
        """Bytes moved into fast memory."""

    @property
    def hit_rate(self) -> float:
        """``hit_pairs`` as a part of all pairs; 1 before the first."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as JSON takes them."""

    def __eq__(self, other: object, /) -> bool:
        """Return whether all fields are equal."""

    def __hash__(self) -> int: ...
    def __repr__(self) -> str: ...

@final
class ExpertUsage:
    """How often each expert of a layer was used; a copy."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def forwards(self) -> int:
        """Forwards counted."""

    @property
    def tokens(self) -> int:
        """Tokens counted."""

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Pairs of each expert, [E]."""

    @property
    def interval(self) -> int:
        """Forwards per row of ``history``; doubles as a long run goes on."""

    @property
    def history(self) -> npt.NDArray[np.int64]:
        """Counts over time, [rows, E]."""

    @property
    def coactivation(self) -> npt.NDArray[np.int64] | None:
        """Tokens that used both experts, [E, E]; None unless the pool was asked to count them."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as JSON takes them."""

    def __eq__(self, other: object, /) -> bool:
        """Return whether all fields are equal."""

    def __hash__(self) -> int: ...
    def __repr__(self) -> str: ...

@final
class ExpertPool:
    """Which experts of a layer have a slot in fast memory: bookkeeping, no weights.

    The number of residents is the budget at all times, and equal inputs give equal placements.
    Thread safe. With ranking 'hits' and decay 0 the rules are those of the TIDE expert pool (RLX).

    Parameters
    ----------
    num_experts : int
        E.
    budget : int
        Experts in fast memory; more than E means all. Experts 0 to budget - 1 start resident.
    refresh : RefreshPolicy, optional
        When the pool is due. None: ``every_steps(1)``.
    ranking : str
        What ranks experts: 'hits' (score = decay * score + hits, once per observed forward),
        'recency' (the last use), or 'fixed' (nobody moves).
    decay : float
        Of 'hits': 0 (only the last forward counts) to 1.
    margin : float
        A challenger must exceed the score of an incumbent by this fraction.
    min_dwell : int
        Observed forwards that a newcomer stays at least.
    admit : bool
        Whether staging gives slots to missing experts; else only refreshes do.
    coactivation : bool
        Whether ``usage`` also counts pairs of experts.

    Raises
    ------
    ConfigError
        A value out of range.

    Examples
    --------
    >>> import moesaic as mo
    >>> pool = mo.ExpertPool(8, 4)
    >>> pool.refresh_from_indices([5, 6, 5, 0]).target
    [5, 0, 6]
    >>> pool.residents.tolist()
    [0, 1, 5, 6]
    """

    def __init__(
        self,
        num_experts: int,
        budget: int,
        refresh: RefreshPolicy | None = None,
        *,
        ranking: _Ranking = "hits",
        decay: float = 0.0,
        margin: float = 0.0,
        min_dwell: int = 0,
        admit: bool = True,
        coactivation: bool = False,
    ) -> None: ...
    @staticmethod
    def all_resident(num_experts: int) -> ExpertPool:
        """Return a pool whose budget is everything."""

    @property
    def num_experts(self) -> int:
        """E."""

    @property
    def budget(self) -> int:
        """Experts in fast memory."""

    @property
    def offload_enabled(self) -> bool:
        """Whether the budget is below E."""

    @property
    def refresh_policy(self) -> RefreshPolicy:
        """When the pool is due."""

    @property
    def ranking(self) -> _Ranking:
        """What ranks experts."""

    def should_refresh(
        self, step: int, is_prefill_block: bool = False, mode: _Mode = "reuse"
    ) -> bool:
        """Return whether the pool is due.

        Parameters
        ----------
        step : int
            The step in the unit of the policy.
        is_prefill_block : bool
            Whether this is a prefill block, at which every pool is due.
        mode : str
            'reuse' leaves it to the policy, 'refresh' forces it (``MoeExecMode``).

        Returns
        -------
        bool
            False without offload.

        Raises
        ------
        ConfigError
            An unknown mode.
        """

    def observe(self, ids: _AnyArray | Sequence[int]) -> None:
        """Count the ids of one forward into the scores.

        Parameters
        ----------
        ids : int array or sequence of int
            Any shape; -1 is skipped.

        Raises
        ------
        ShapeError
            An id out of range.
        """

    def refresh(self) -> RefreshResult:
        """Place the best experts. Nothing moves before ``MoeExpertStore.apply``."""

    def refresh_from_indices(self, ids: _AnyArray | Sequence[int]) -> RefreshResult:
        """Call ``observe(ids)``, then ``refresh()``.

        Parameters
        ----------
        ids : int array or sequence of int
            Any shape; -1 is skipped.

        Returns
        -------
        RefreshResult

        Raises
        ------
        ShapeError
            An id out of range.
        """

    def apply_target(self, target: _AnyArray | Sequence[int]) -> RefreshResult:
        """Place these experts.

        Parameters
        ----------
        target : int array or sequence of int
            At most ``budget`` experts, best first.

        Returns
        -------
        RefreshResult

        Raises
        ------
        ShapeError
            An id out of range or named twice, or too many.
        """

    def stage(self, ids: _AnyArray | Sequence[int]) -> list[tuple[int, int, int]]:
        """Call ``observe(ids)``, and give missing experts slots.

        They get one where they rank above an expert that these ids do not need. A layer with
        ``on_miss='stage'`` calls this for each forward.

        Parameters
        ----------
        ids : int array or sequence of int
            Any shape; -1 is skipped.

        Returns
        -------
        list of tuple of int
            (expert, slot, evicted expert or -1).

        Raises
        ------
        ShapeError
            An id out of range.
        """

    def warm(self, scores: Sequence[float]) -> RefreshResult:
        """Set the scores and place by them.

        Parameters
        ----------
        scores : sequence of float
            [E], none negative.

        Returns
        -------
        RefreshResult

        Raises
        ------
        ShapeError
            Another length, or a negative score.
        """

    def target(self) -> list[int]:
        """Return the best experts by score, best first, those with a score of zero left out."""

    @property
    def residents(self) -> npt.NDArray[np.int32]:
        """The experts that have a slot, ascending."""

    @property
    def resident_mask(self) -> npt.NDArray[np.bool_]:
        """Whether each expert has a slot, [E]."""

    @property
    def slot_map(self) -> npt.NDArray[np.int32]:
        """Slot of each expert as decided, [E], -1 without one.

        ``MoeExpertStore.slot_map`` tells what is loaded.
        """

    @property
    def scores(self) -> npt.NDArray[np.float64]:
        """Score of each expert, [E]."""

    @property
    def stats(self) -> PoolStats:
        """What the pool did, a copy."""

    def reset_stats(self) -> None:
        """Set the stats to zero."""

    @property
    def usage(self) -> ExpertUsage:
        """How often each expert was used by the forwards that ran, a copy."""

    def __repr__(self) -> str: ...

def target_from_counts(counts: Sequence[int], budget: int) -> list[int]:
    """Return the experts with the most hits.

    Parameters
    ----------
    counts : sequence of int
        Hits of each expert, [E].
    budget : int
        At most so many experts.

    Returns
    -------
    list of int
        Descending by hits, ties to the lower id, those without hits left out.

    Examples
    --------
    >>> import moesaic as mo
    >>> mo.target_from_counts([0, 3, 1, 3], budget=2)
    [1, 3]
    """

def merged_resident_mask(pools: Sequence[ExpertPool]) -> npt.NDArray[np.bool_]:
    """Return which experts are resident in any of the pools.

    Parameters
    ----------
    pools : sequence of ExpertPool
        Pools of one size.

    Returns
    -------
    bool array [E]

    Raises
    ------
    ShapeError
        Pools of different sizes.
    DTypeError
        ``pools`` holds None or another type.
    """

@final
class ExpertRole:
    """One role of a layer in a store, in the form y[n] = sum over k of x[k] * w[k, n]."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def num_experts(self) -> int:
        """E."""

    @property
    def k(self) -> int:
        """Input features."""

    @property
    def n(self) -> int:
        """Output features."""

    @property
    def quant(self) -> str:
        """Element type as ggml spells it."""

    @property
    def expert_stride(self) -> int:
        """From one expert to the next in ``as_slice``: k * n elements of F32, else bytes."""

    def expert_slice(self, expert: int) -> npt.NDArray[Any]:
        """Return one expert without a copy: f32 [k, n], or its encoded bytes.

        Raises
        ------
        ShapeError
            No such expert.
        """

    def as_slice(self) -> npt.NDArray[Any]:
        """Return all experts without a copy: f32 [E, k, n], or the encoded bytes.

        Raises
        ------
        UnsupportedError
            They do not lie one behind the other.
        """

    @property
    def scale(self) -> _F32 | None:
        """Factors [E] that a forward multiplies the experts' products with; None without them.

        ``expert_slice`` and ``as_slice`` show what is stored, without them.
        """

    def __repr__(self) -> str: ...

@final
class LayerMoeWeights:
    """The experts of one layer in a store."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def layer_index(self) -> int:
        """Block number in the model."""

    @property
    def gate(self) -> ExpertRole | None:
        """Gate, with k = H and n = I; None for ungated experts."""

    @property
    def up(self) -> ExpertRole:
        """Up, with k = H and n = I."""

    @property
    def down(self) -> ExpertRole:
        """Down, with k = I and n = H."""

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert, all roles, as stored."""

    @property
    def stack(self) -> ExpertStack:
        """The experts as stored."""

    def __repr__(self) -> str: ...

@final
class MoeExpertStore:
    """The experts of all MoE layers of a model, in slow memory.

    That is a mapped file or, under a memory limit, files that are read with several requests in
    flight. Thread safe. A mapped file must not be truncated meanwhile (SIGBUS); one that is read
    is not for use in a forked child. A store of a file pickles as how to open it, without its
    pools.

    Examples
    --------
    >>> import moesaic as mo, numpy as np
    >>> _ = mo.testing.write_moe_gguf("model.gguf")  # a small model with random weights
    >>> store = mo.MoeExpertStore.from_gguf(mo.GgufFile("model.gguf"))
    >>> pool = mo.ExpertPool(num_experts=8, budget=4)
    >>> layer = mo.MoeLayer.from_store(store, 0, pool, on_miss="stage")
    >>> layer(np.ones((3, 256), np.float32)).shape
    (3, 256)
    """

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @staticmethod
    def from_gguf(
        file: _GgufSource,
        *,
        memory_limit: int | None = None,
        staging: int = 0,
        io_threads: int = 16,
        read_ahead: int = 4,
        direct_io: bool | None = None,
    ) -> MoeExpertStore:
        """Take every MoE layer of a GGUF file as stored, without a copy.

        Parameters
        ----------
        file : GgufFile or path
            The model. A path is opened for this call.
        memory_limit : int, optional
            Bytes that slots and staging together stay below: experts are then read from the file.
            None: they are used where the file is mapped.
        staging : int
            With a limit: experts between disk and slots; 0: 16, or fewer where memory is short.
        io_threads : int
            With a limit: requests in flight at most.
        read_ahead : int
            With a limit: experts of the next layer that each forward asks for ahead, by routing
            history. While too few of them are used, none are asked for.
        direct_io : bool, optional
            With a limit: whether reads go past the page cache (O_DIRECT). None: where the file
            system can; ``reading`` says what was chosen and why.

        Returns
        -------
        MoeExpertStore

        Raises
        ------
        FileNotFoundError, OSError
            ``file`` is a path that is absent or cannot be read.
        FormatError, UnsupportedError
            As ``ExpertStack.load_from_gguf``; also a limit on a file opened without mmap, and
            ``direct_io=True`` on a file system that cannot.
        ConfigError
            A bad option, or a limit below two experts.
        """

    @staticmethod
    def from_safetensors(
        path: _Path | CheckpointExperts,
        *,
        prefix: str | None = None,
        memory_limit: int,
        staging: int = 0,
        io_threads: int = 16,
        read_ahead: int = 4,
        direct_io: bool | None = None,
    ) -> MoeExpertStore:
        """Take every MoE layer of a Hugging Face checkpoint, whose experts are read one by one.

        Each becomes what ``MoeLayer.from_safetensors`` would hold of it, so results are the same
        bits: floats as they are, FP8 as 'E4M3' or, like INT8, as BF16, FP4 and INT4 repacked
        without loss.

        Parameters
        ----------
        path : str or path
            A folder, one .safetensors file, or an index file.
        prefix : str, optional
            Of which part of the model, as in ``MoeLayer.from_safetensors``.
        memory_limit : int
            Bytes that slots and staging together stay below.
        staging, io_threads, read_ahead, direct_io
            As in ``from_gguf``. A staging buffer holds an expert twice where it is decoded: as
            stored, and as kernels read it.

        Returns
        -------
        MoeExpertStore

        Raises
        ------
        FileNotFoundError, OSError, FormatError
            As ``MoeLayer.from_safetensors``. That some values are no numbers shows in the call that
            reads them.
        UnsupportedError
            Experts in a form that is not read one by one (the message names a tensor and the way
            out), ``direct_io=True`` on a file system that cannot.
        ConfigError
            A bad option, a limit below two experts, or a ``prefix`` beside experts that were opened
            before.
        """

    @staticmethod
    def from_arrays(
        layers: Sequence[tuple[_AnyArray | None, _AnyArray, _AnyArray]],
        layer_indices: Sequence[int] | None = None,
    ) -> MoeExpertStore:
        """Take arrays in the layout of grouped matmuls, converted once.

        Parameters
        ----------
        layers : sequence of tuple of array
            (gate [E, H, I] or None, up [E, H, I], down [E, I, H]) of each layer; f32, f16 or bf16.
        layer_indices : sequence of int, optional
            Block number of each layer. None: 0, 1 and so on.

        Returns
        -------
        MoeExpertStore

        Raises
        ------
        ShapeError, DTypeError
            An array does not fit; the message names layer and role.
        """

    @property
    def num_layers(self) -> int:
        """MoE layers."""

    @property
    def layers(self) -> list[LayerMoeWeights]:
        """The experts of each layer."""

    def refresh_pools(
        self,
        pools: Sequence[ExpertPool],
        ids: Sequence[_AnyArray | Sequence[int]],
        step: int,
        is_prefill_block: bool = False,
        mode: _Mode = "reuse",
    ) -> list[RefreshResult]:
        """Refresh each pool that is due by its own policy. Nothing moves before ``apply``.

        Parameters
        ----------
        pools : sequence of ExpertPool
            One per layer.
        ids : sequence of int array
            Ids of each layer in the last forward, any shape.
        step, is_prefill_block, mode
            As in ``ExpertPool.should_refresh``.

        Returns
        -------
        list of RefreshResult
            One per layer.

        Raises
        ------
        ShapeError
            Lists of unequal length, or an id out of range; then no pool has changed.
        DTypeError
            ``pools`` holds None or another type, or ids are no integers.
        ConfigError
            An unknown mode.
        """

    def apply(self, pools: Sequence[ExpertPool]) -> int:
        """Make the slots hold what the pools say, moving only what changed.

        Forwards may run meanwhile in other threads. After an error, what was not loaded counts as
        not resident.

        Parameters
        ----------
        pools : sequence of ExpertPool
            One per layer.

        Returns
        -------
        int
            Bytes moved.

        Raises
        ------
        ShapeError
            Another number of pools, or of experts.
        DTypeError
            ``pools`` holds None or another type.
        ConfigError
            A layer runs with another pool, or the slots exceed the memory limit.
        OSError, FormatError
            The experts cannot be read.
        """

    def prefetch(self, layer: int, ids: _AnyArray | Sequence[int]) -> None:
        """Say that a layer will soon need these experts, as predicted by the caller.

        Those without a slot begin to be read, as many as half of the staging buffers hold; of a
        mapped file, the system reads them. Results do not depend on it.

        Parameters
        ----------
        layer : int
            Block number in the model.
        ids : int array or sequence of int
            Experts, the likeliest first, any shape; negative ones are skipped.

        Raises
        ------
        ShapeError
            No such block, or an id that is no expert.
        """

    def fitting_budgets(self, memory: int | None = None, *, reserve: int = 0) -> list[int]:
        """Return how many experts of each layer have room.

        The staging buffers, the layout of slots and whatever rounds up to pages are counted, so
        that ``apply`` and layers on pools of these budgets take no more.

        Parameters
        ----------
        memory : int, optional
            Bytes for slots, buffers and the reserve. None: the memory limit; all experts have room
            without one.
        reserve : int
            Bytes to leave for something else.

        Returns
        -------
        list of int
            One per layer: equally many, one more in the first ones where that fits.

        Raises
        ------
        ConfigError
            Not even buffers and reserve fit.
        """

    def slot_bytes(self, budgets: Sequence[int]) -> int:
        """Return the bytes that the slots of pools take.

        Parameters
        ----------
        budgets : sequence of int
            Experts in fast memory, one number a layer.

        Returns
        -------
        int
            As memory is given out, rounded up to pages.

        Raises
        ------
        ShapeError
            Not one a layer.
        """

    @property
    def reading(self) -> str:
        """How experts are read: 'mapped', 'O_DIRECT', or 'page cache' with the reason."""

    def slot_map(self, i: int) -> npt.NDArray[np.int32]:
        """Return the slot of each expert of layer ``i`` that is in fast memory now.

        Returns
        -------
        int32 array [E]
            -1 without one; empty before any use.
        """

    def pools(self) -> list[ExpertPool | None]:
        """Return the pool that each layer runs with, or None."""

    def profile(self) -> ExpertProfile:
        """Return what the forwards of its layers used: print, save or plot it, or warm pools.

        Raises
        ------
        ConfigError
            No layer runs with a pool.
        """

    def memory(self) -> dict[str, int | None]:
        """Return bytes: slots, staging, and limit (None without one)."""

    def io_stats(self) -> dict[str, int]:
        """Return what the reads from disk were.

        Returns
        -------
        dict
            reads, bytes, most_in_flight, cached (experts asked for that were in staging already),
            ahead (experts read ahead), ahead_used (those asked for later), and guessing (0 while
            reads ahead by history are paused, since too few were used).
        """

    def __copy__(self) -> Never:
        """Raise DTypeError: ``from_gguf`` opens another store."""

    def __deepcopy__(self, memo: dict[int, Any], /) -> Never:
        """Raise DTypeError: ``from_gguf`` opens another store."""

    def __repr__(self) -> str: ...

@final
class Workspace:
    """Scratch memory of the caller, for one forward at a time.

    A call without ``workspace=`` uses one from a cache. Two calls with one workspace at once are
    an error (WorkspaceError).

    Parameters
    ----------
    nbytes : int
        Size in bytes.
    device : str
        'cpu', 'cuda:0' or 'metal'.

    Raises
    ------
    OutOfMemoryError, DeviceError
        The memory is full or the device absent.
    """

    def __init__(self, nbytes: int, device: str = "cpu") -> None: ...
    @staticmethod
    def for_layer(layer: MoeLayer, max_tokens: int = 512) -> Workspace:
        """Return one that is enough for any path of a layer under the current tuning.

        Parameters
        ----------
        layer : MoeLayer
            The layer to call; the workspace lies on its device.
        max_tokens : int
            Tokens of a call at most.

        Returns
        -------
        Workspace

        Raises
        ------
        ShapeError
            A negative number of tokens.
        DeviceError, OutOfMemoryError
            The layer is closed, or the memory full.
        """

    @staticmethod
    def for_stack(stack: ExpertStack, top_k: int, max_tokens: int = 512) -> Workspace:
        """Return one that is enough for ``moe_forward`` over a bare stack.

        Parameters
        ----------
        stack : ExpertStack
            The experts; the workspace lies on their device.
        top_k : int
            Experts per token, at least 1.
        max_tokens : int
            Tokens of a call at most.

        Returns
        -------
        Workspace

        Raises
        ------
        ShapeError
            A number below these bounds.
        OutOfMemoryError
            The memory is full.
        """

    @staticmethod
    def for_matrix(matrix: QuantMatrix, max_rows: int = 512) -> Workspace:
        """Return one that is enough for products with a matrix.

        Parameters
        ----------
        matrix : QuantMatrix
            The matrix that will be called.
        max_rows : int
            Rows of x at most, 0 to 2^30 - 1.

        Returns
        -------
        Workspace

        Raises
        ------
        ShapeError
            A number outside these bounds.
        OutOfMemoryError
            The memory is full.
        """

    @property
    def nbytes(self) -> int:
        """Size in bytes."""

    def __repr__(self) -> str: ...

def trim() -> int:
    """Give memory back that is kept for the next calls without a ``workspace=``.

    Calls let go of what they do not need by themselves, after some calls that needed less than half
    of it. This is for a process that will not call again soon.

    Returns
    -------
    int
        The bytes that were given back.

    Examples
    --------
    >>> mo.trim() >= 0
    True
    """

# --- routing and plans ------------------------------------------------------------------------

@final
class Routing:
    """Which experts each token goes to, and with which weight.

    An id of -1 skips its pair. Arrays in host memory are copied. Arrays on a GPU (int32 and f32,
    dense) are kept: calls there read them without a look at their values, and an id out of range
    counts as -1.

    Parameters
    ----------
    topk_ids : int32 or int64 array [T, top_k]
        Expert of each pair.
    topk_weights : array [T, top_k]
        Weight of each pair; f32, in host memory f16 or bf16 too.
    skipped : int
        An id that counts as -1, such as the number of experts, by which expert parallelism marks
        the pairs of other machines. It is asked for, because from a caller that counts from 1 that
        id is an expert.

    Raises
    ------
    ShapeError, DTypeError, DeviceError
        An array does not fit; the message names it.
    UnsupportedError
        ``skipped`` for ids on a GPU.

    Examples
    --------
    >>> import moesaic as mo, numpy as np
    >>> weights = np.full((2, 2), 0.5, np.float32)
    >>> mo.Routing(np.array([[0, 2], [1, -1]]), weights).top_k
    2
    >>> mo.Routing(np.array([[0, 3], [3, 1]]), weights, skipped=3).topk_ids.tolist()
    [[0, -1], [-1, 1]]
    """

    def __init__(
        self, topk_ids: _AnyArray, topk_weights: _AnyArray, *, skipped: int = -1
    ) -> None: ...
    @property
    def topk_ids(self) -> Any:
        """Expert of each pair, int32 [T, top_k], an array of the kind that the routing was made of.

        So a layer called with a tensor of torch gives tensors of torch. numpy's arrays and
        ``Array`` are read-only views, those of other packages copies; on a GPU it is the array
        itself. ``route`` orders the ids by descending weight, ties to the lower expert id.
        """

    @property
    def topk_weights(self) -> Any:
        """Weight of each pair, f32 [T, top_k], an array as ``topk_ids`` is one."""

    @property
    def num_tokens(self) -> int:
        """T."""

    @property
    def top_k(self) -> int:
        """Experts per token."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as JSON takes them, arrays as lists."""

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Routing:
        """Return what ``to_dict`` gave, as it is or out of JSON.

        Parameters
        ----------
        fields : mapping
            Values by the names of the fields; all three are needed.

        Returns
        -------
        Routing

        Raises
        ------
        TypeError
            A name that is no field; the message has the nearest one.
        ConfigError, ShapeError
            A field is missing.
        """

    def __eq__(self, other: object, /) -> bool:
        """Return whether all fields are equal, bit by bit."""

    __hash__ = None  # type: ignore[assignment]
    def __repr__(self) -> str: ...

def route(
    logits: _AnyArray,
    router: RouterConfig | None = None,
    *,
    top_k: int | None = None,
    renormalize: bool | None = None,
    topk_ids: _AnyArray | None = None,
    out: Routing | None = None,
) -> Routing:
    """Route logits on the host.

    Logits are ordered finite and +inf > -inf > NaN, ties to the lower expert id. A row with
    nothing to choose from gives ids 0 to top_k - 1 with weights 1 / top_k.

    Parameters
    ----------
    logits : array [..., E]
        Output of the router's matrix product; f32, f16 or bf16.
    router : RouterConfig, optional
        How to route. None: softmax, with the two arguments below.
    top_k : int, optional
        Experts per token, without a ``router``.
    renormalize : bool, optional
        Whether weights are made to sum to one, without a ``router``; True when not given.
    topk_ids : int array [..., top_k], optional
        The ids, for a router with select_on 'given': their weights are computed.
    out : Routing, optional
        Returned with new values, without an allocation where it is large enough and neither a
        call of another thread nor an array of it is in use.

    Returns
    -------
    Routing

    Raises
    ------
    ShapeError, DTypeError, DeviceError
        An array does not fit.
    ConfigError
        Arguments that contradict each other; NaN or infinity under the knob ``strict``.

    Examples
    --------
    >>> import moesaic as mo, numpy as np
    >>> routing = mo.route(np.array([[0.0, 3.0, 1.0, 2.0]], np.float32), top_k=2)
    >>> routing.topk_ids.tolist(), routing.topk_weights.round(2).tolist()
    ([[1, 3]], [[0.7300000190734863, 0.27000001072883606]])
    """

@final
class BucketPlan:
    """The pairs of a routing sorted by expert, stably.

    A packed row is the position of a pair after that sort. Make one with ``build``.
    """

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @staticmethod
    def build(routing: Routing, num_experts: int) -> BucketPlan:
        """Sort the pairs of a routing.

        Parameters
        ----------
        routing : Routing
            In host memory.
        num_experts : int
            E.

        Returns
        -------
        BucketPlan

        Raises
        ------
        ShapeError
            An id below -1 or not below E.
        DeviceError
            The routing lies on a GPU.

        Examples
        --------
        >>> import moesaic as mo, numpy as np
        >>> routing = mo.Routing(np.array([[2, 0], [0, 1]]), np.ones((2, 2), np.float32))
        >>> plan = mo.BucketPlan.build(routing, num_experts=3)
        >>> plan.expert_offsets.tolist(), plan.row_pair.tolist()
        ([0, 2, 3, 4], [1, 2, 3, 0])
        """

    def rebuild(self, routing: Routing) -> BucketPlan:
        """Sort the pairs of another routing, reusing memory.

        Arrays taken before keep their values, in memory of their own from then on.

        Parameters
        ----------
        routing : Routing
            In host memory.

        Returns
        -------
        BucketPlan
            This object.

        Raises
        ------
        ShapeError, DeviceError
            As ``build``.
        """

    @property
    def num_experts(self) -> int:
        """E."""

    @property
    def num_tokens(self) -> int:
        """T."""

    @property
    def top_k(self) -> int:
        """Experts per token."""

    @property
    def num_pairs(self) -> int:
        """P = T * top_k."""

    @property
    def num_rows(self) -> int:
        """Pairs that are not skipped, which is the number of packed rows."""

    @property
    def expert_offsets(self) -> npt.NDArray[np.int32]:
        """[E + 1]: the packed rows of expert e are those from [e] up to [e + 1]."""

    @property
    def row_token(self) -> npt.NDArray[np.int32]:
        """Token of each packed row, [P]; valid up to ``num_rows``."""

    @property
    def row_pair(self) -> npt.NDArray[np.int32]:
        """Pair of each packed row, [P]; valid up to ``num_rows``."""

    @property
    def pair_row(self) -> npt.NDArray[np.int32]:
        """Packed row of each pair, [P]; -1 for a skipped one."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as JSON takes them, arrays as lists."""

    def __eq__(self, other: object, /) -> bool:
        """Return whether all fields are equal, bit by bit."""

    __hash__ = None  # type: ignore[assignment]
    def __repr__(self) -> str: ...

@final
class AlignedRouting:
    """Pairs sorted by expert, each expert padded to whole blocks.

    ``align_block_size`` makes it, in the form that vLLM's fused MoE kernels read.
    """

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def block_size(self) -> int:
        """Rows of a block."""

    @property
    def num_experts(self) -> int:
        """E."""

    @property
    def num_pairs(self) -> int:
        """P."""

    @property
    def num_blocks(self) -> int:
        """Blocks that are used: ``num_post_pad`` / ``block_size``."""

    @property
    def row_space(self) -> _RowSpace:
        """What a sorted id is: the number of a pair, or of a packed row."""

    @property
    def num_post_pad(self) -> int:
        """Rows with their padding."""

    @property
    def sorted_ids(self) -> npt.NDArray[np.int32]:
        """[num_post_pad]; padding is P and stands at the end of its block."""

    @property
    def block_experts(self) -> npt.NDArray[np.int32]:
        """Expert of each block; -1 behind the last one."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as JSON takes them, arrays as lists."""

    def __eq__(self, other: object, /) -> bool:
        """Return whether all fields are equal."""

    def __hash__(self) -> int: ...
    def __repr__(self) -> str: ...

def align_block_size(
    routing: Routing, num_experts: int, block_size: int, row_space: _RowSpace = "token_pairs"
) -> AlignedRouting:
    """Sort pairs by expert and pad each expert to whole blocks.

    Parameters
    ----------
    routing : Routing
        In host memory.
    num_experts : int
        E.
    block_size : int
        Rows of a block, at least 1.
    row_space : str
        What a sorted id is: 'token_pairs', the number of a pair, or 'packed_rows', that of a
        packed row.

    Returns
    -------
    AlignedRouting

    Raises
    ------
    ShapeError
        An id below -1 or not below E.
    ConfigError
        A block size below 1, or an unknown row space.
    DeviceError
        The routing lies on a GPU.

    Examples
    --------
    >>> import moesaic as mo, numpy as np
    >>> routing = mo.Routing(np.array([[2, 0], [0, 1]]), np.ones((2, 2), np.float32))
    >>> aligned = mo.align_block_size(routing, num_experts=3, block_size=4)
    >>> aligned.sorted_ids.tolist()
    [1, 2, 4, 4, 3, 4, 4, 4, 0, 4, 4, 4]
    """

def pick_block_size(
    plan: BucketPlan | None,
    *,
    device_route: bool = False,
    total_pairs: int | None = None,
    tuning: Tuning | None = None,
) -> int:
    """Return the block size of the aligned GEMM.

    Parameters
    ----------
    plan : BucketPlan or None
        The pairs by expert; may be None on the device route, where only their number is known.
    device_route : bool
        Whether the routing happens on the device.
    total_pairs : int, optional
        Number of pairs. None: those of the plan.
    tuning : Tuning, optional
        None: the current one.

    Returns
    -------
    int
        The tuning's own block size, else the one that suits the padding it would cost.

    Raises
    ------
    ShapeError
        A negative number of pairs.
    """

# --- operations and forwards ------------------------------------------------------------------

@overload
def gather_rows(
    x: _Numpy, plan: BucketPlan, *, out: _AnyArray | None = None, stream: _Stream = None
) -> _F32:
    """Copy the row of each pair into packed order.

    Parameters
    ----------
    x : array [..., H]
        f32, f16 or bf16. The call runs where it lies.
    plan : BucketPlan
        The order. A GPU gets a copy of it, so that the call waits for its launches.
    out : f32 array [P, H], optional
        Written to and returned.
    stream : object, optional
        CUDA stream that the call joins; None: the current one of the package of ``x``.

    Returns
    -------
    f32 array [P, H]
        ``out``, or a new array of the kind of ``x``; rows behind the last pair are zero.

    Raises
    ------
    ShapeError, DTypeError, DeviceError
        An array does not fit.
    CaptureError
        A graph is being recorded.
    """

@overload
def gather_rows(
    x: _A, plan: BucketPlan, *, out: _AnyArray | None = None, stream: _Stream = None
) -> _A: ...
@overload
def silu_mul(gate_up: _Numpy, *, out: _AnyArray | None = None, stream: _Stream = None) -> _F32:
    """Return silu(gate) * up.

    Parameters
    ----------
    gate_up : array [P, 2I]
        f32, f16 or bf16, gate first. The call runs where it lies.
    out : f32 array [P, I], optional
        Written to and returned.
    stream : object, optional
        CUDA stream that the call joins; None: the current one of the package of ``gate_up``.

    Returns
    -------
    f32 array [P, I]
        ``out``, or a new array of the kind of ``gate_up``.

    Raises
    ------
    ShapeError, DTypeError, DeviceError
        An array does not fit.

    Examples
    --------
    >>> import moesaic as mo, numpy as np
    >>> mo.silu_mul(np.array([[0.0, 20.0, 5.0, 2.0]], np.float32)).tolist()
    [[0.0, 40.0]]
    """

@overload
def silu_mul(gate_up: _A, *, out: _AnyArray | None = None, stream: _Stream = None) -> _A: ...
@overload
def combine(
    rows: _Numpy,
    plan: BucketPlan,
    routing: Routing,
    *,
    out: _AnyArray | None = None,
    accumulate: bool = False,
    stream: _Stream = None,
) -> _F32:
    """Return the weighted sum of each token's rows, which are in packed order.

    Parameters
    ----------
    rows : array [P, H]
        f32, f16 or bf16, in packed order. The call runs where it lies.
    plan : BucketPlan
        The order. A GPU gets a copy of it, so that the call waits for its launches.
    routing : Routing
        The weights, on the host or where ``rows`` lies.
    out : f32 array [T, H], optional
        Written to and returned.
    accumulate : bool
        Whether to add to ``out`` in place of overwriting it.
    stream : object, optional
        CUDA stream that the call joins; None: the current one of the package of ``rows``.

    Returns
    -------
    f32 array [T, H]
        ``out``, or a new array of the kind of ``rows``.

    Raises
    ------
    ShapeError, DTypeError, DeviceError
        An array does not fit.
    ConfigError
        ``accumulate`` without ``out``.
    CaptureError
        A graph is being recorded.
    """

@overload
def combine(
    rows: _A,
    plan: BucketPlan,
    routing: Routing,
    *,
    out: _AnyArray | None = None,
    accumulate: bool = False,
    stream: _Stream = None,
) -> _A: ...
@overload
def weighted_sum(
    pairs: _Numpy,
    routing: Routing,
    *,
    out: _AnyArray | None = None,
    accumulate: bool = False,
    stream: _Stream = None,
) -> _F32:
    """Return the weighted sum of each token's rows, which are in pair order.

    With a ``Routing`` on the GPU and ``out``, a graph can record it.

    Parameters
    ----------
    pairs : array [P, H]
        f32, f16 or bf16, in pair order. The call runs where it lies.
    routing : Routing
        The weights, on the host or where ``pairs`` lies.
    out : f32 array [T, H], optional
        Written to and returned.
    accumulate : bool
        Whether to add to ``out`` in place of overwriting it.
    stream : object, optional
        CUDA stream that the call joins; None: the current one of the package of ``pairs``.

    Returns
    -------
    f32 array [T, H]
        ``out``, or a new array of the kind of ``pairs``.

    Raises
    ------
    ShapeError, DTypeError, DeviceError
        An array does not fit.
    ConfigError
        ``accumulate`` without ``out``.
    CaptureError
        A graph is being recorded, and the routing lies on the host.
    """

@overload
def weighted_sum(
    pairs: _A,
    routing: Routing,
    *,
    out: _AnyArray | None = None,
    accumulate: bool = False,
    stream: _Stream = None,
) -> _A: ...
def moe_forward(
    x: _A,
    logits: _AnyArray | None,
    stack: ExpertStack | MoeLayer,
    *,
    top_k: int | None = None,
    renormalize: bool | None = None,
    router: RouterConfig | None = None,
    routing: Routing | None = None,
    activation: Activation | _ActivationName | None = None,
    out: _A | None = None,
    workspace: Workspace | None = None,
    accumulate: bool = False,
    precision: _Precision | None = None,
    stream: _Stream = None,
) -> _A:
    """Route tokens and run their experts, on the path that suits the sizes.

    Parameters
    ----------
    x : array [..., H]
        f32, f16 or bf16, on the device of the stack.
    logits : array [..., E] or None
        What to route by. None with a ``routing``, or with a layer whose own router is to run.
    stack : ExpertStack or MoeLayer
        The experts. With a ``MoeLayer`` router, activation and shared experts are the layer's.
    top_k : int, optional
        Experts per token, routed by softmax.
    renormalize : bool, optional
        Whether the weights are made to sum to one, beside ``top_k``; True when not given.
    router : RouterConfig, optional
        How to route, in place of ``top_k`` and ``renormalize``.
    routing : Routing, optional
        Ready ids and weights, in place of ``logits``.
    activation : Activation or str, optional
        Activation of a bare stack, or its kind; swiglu when not given.
    out, workspace, accumulate, precision, stream
        As in ``MoeLayer.__call__``.

    Returns
    -------
    array [..., H]
        ``out``, or a new array of the shape, element type and kind of ``x``.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, WorkspaceError, ConfigError
        As in ``MoeLayer.__call__``.

    Examples
    --------
    >>> import moesaic as mo, numpy as np
    >>> rng = np.random.default_rng(0)
    >>> gate, up = (rng.standard_normal((4, 64, 32), np.float32) for _ in range(2))  # [E, I, H]
    >>> down = rng.standard_normal((4, 32, 64), np.float32)  # [E, H, I]
    >>> stack = mo.ExpertStack.from_dense_stacks(gate, up, down)
    >>> x, logits = rng.standard_normal((5, 32), np.float32), np.zeros((5, 4), np.float32)
    >>> mo.moe_forward(x, logits, stack, top_k=2).shape
    (5, 32)
    """

def moe_forward_bucketed(
    x: _A,
    logits: _AnyArray | None,
    stack: ExpertStack | MoeLayer,
    *,
    top_k: int | None = None,
    renormalize: bool | None = None,
    router: RouterConfig | None = None,
    routing: Routing | None = None,
    activation: Activation | _ActivationName | None = None,
    gemm: _Gemm = "auto",
    row_space: _RowSpaceMode = "auto",
    out: _A | None = None,
    workspace: Workspace | None = None,
    accumulate: bool = False,
    precision: _Precision | None = None,
    stream: _Stream = None,
) -> _A:
    """Route tokens and run their experts: always plan first, then grouped GEMMs.

    Parameters
    ----------
    x, logits, stack, top_k, renormalize, router, routing, activation
        As in ``moe_forward``.
    gemm : str
        'bucketed' multiplies the pairs of each expert, 'aligned' blocks of them; 'auto' leaves it
        to the tuning.
    row_space : str
        Rows of the aligned GEMM: 'token_pairs' reads them in place, 'packed_rows' gathers them
        first; 'auto' leaves it to the tuning.
    out, workspace, accumulate, precision, stream
        As in ``MoeLayer.__call__``.

    Returns
    -------
    array [..., H]
        ``out``, or a new array of the shape, element type and kind of ``x``.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, WorkspaceError, ConfigError
        As in ``MoeLayer.__call__``.
    """

def moe_forward_cpu(
    x: _A,
    routing: Routing,
    stack: ExpertStack | MoeLayer,
    *,
    activation: Activation | _ActivationName | None = None,
    out: _A | None = None,
    workspace: Workspace | None = None,
    accumulate: bool = False,
    precision: _Precision | None = None,
    stream: _Stream = None,
) -> _A:
    """Run the f32 reference: one pair after another, slow, what all paths are compared with.

    Workspace, precision and tuning do not change it.

    Parameters
    ----------
    x : array [..., H]
        f32, f16 or bf16, in host memory.
    routing : Routing
        Ready ids and weights.
    stack : ExpertStack or MoeLayer
        The experts. With a ``MoeLayer`` its shared experts are added.
    activation : Activation or str, optional
        Activation of a bare stack, or its kind; swiglu when not given.
    out, workspace, accumulate, precision, stream
        As in ``MoeLayer.__call__``.

    Returns
    -------
    array [..., H]
        ``out``, or a new array of the shape, element type and kind of ``x``.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, ConfigError
        As in ``MoeLayer.__call__``.
    """

# --- knobs, profile, what is here -------------------------------------------------------------

@type_check_only
class _TuningKnobs(TypedDict, total=False):
    block_size: int | None
    large_m_block_size: int | None
    large_m_min_pairs: int
    gemm: _Gemm
    route: _Route
    row_space: _RowSpaceMode
    precision: _Precision
    batch_invariant: bool
    profile: Literal["off", "counters", "events", "sync"]
    strict: bool
    threads: int | None
    numa: int | Literal["off"] | None
    cpu_isa: str | None
    backend: str | None
    cuda_plugin: str | None
    log: _Log
    poison: bool

@final
class Tuning:
    """Every knob, immutable; None means that the library chooses.

    Make one current with ``tuning``. A knob of a call comes before the current tuning, that
    before the environment, that before the default. ``show_config`` lists all of them with their
    environment variables.

    Parameters
    ----------
    block_size, large_m_block_size, large_m_min_pairs, gemm, route, row_space, precision, \
batch_invariant, profile, strict, threads, numa, cpu_isa, backend, cuda_plugin, log, poison
        As the properties of these names say.

    Raises
    ------
    ConfigError
        A value out of range; the message has the accepted ones.

    Examples
    --------
    >>> import moesaic as mo
    >>> mo.Tuning(block_size=32).replace(gemm="aligned")
    moesaic.Tuning(gemm='aligned', block_size=32)
    """

    def __init__(
        self,
        *,
        block_size: int | None = None,
        large_m_block_size: int | None = None,
        large_m_min_pairs: int = 1024,
        gemm: _Gemm = "auto",
        route: _Route = "auto",
        row_space: _RowSpaceMode = "auto",
        precision: _Precision = "auto",
        batch_invariant: bool = False,
        profile: Literal["off", "counters", "events", "sync"] = "off",
        strict: bool = False,
        threads: int | None = None,
        numa: int | Literal["off"] | None = None,
        cpu_isa: str | None = None,
        backend: str | None = None,
        cuda_plugin: str | None = None,
        log: _Log = "warn",
        poison: bool = False,
    ) -> None: ...
    @staticmethod
    def from_env(variables: Mapping[str, str] | None = None) -> Tuning:
        """Read knobs from MOESAIC_* variables; unknown names are logged as warnings.

        Parameters
        ----------
        variables : mapping of str to str, optional
            None: the environment of the process, which is read once.

        Returns
        -------
        Tuning

        Raises
        ------
        ConfigError
            A bad value; the message has the variable and the accepted values.
        """

    @property
    def block_size(self) -> int | None:
        """Rows per block of the aligned GEMM (auto|8|16|32|48|64)."""

    @property
    def large_m_block_size(self) -> int | None:
        """Rows per block on a device from large_m_min_pairs pairs on (auto|8|16|32|48|64)."""

    @property
    def large_m_min_pairs(self) -> int:
        """Pairs from which large_m_block_size holds (an integer, at least 1)."""

    @property
    def gemm(self) -> _Gemm:
        """Grouped GEMM over buckets or over aligned blocks (auto|bucketed|aligned)."""

    @property
    def route(self) -> _Route:
        """Where a layer routes: auto, on its own device; host costs a wait for the logits; device
        is an error on the CPU (auto|host|device).
        """

    @property
    def row_space(self) -> _RowSpaceMode:
        """Rows of the grouped GEMM: pairs in place, or gathered (auto|token_pairs|packed_rows)."""

    @property
    def precision(self) -> _Precision:
        """Activations against quantised weights: two int8 planes or one (auto|exact|fast)."""

    @property
    def batch_invariant(self) -> bool:
        """A token's result does not depend on its batch (0|1|true|false|on|off)."""

    @property
    def profile(self) -> Literal["off", "counters", "events", "sync"]:
        """Zone totals and counters; events keeps a trace; sync waits for the device at each zone
        (off|counters|events|sync).
        """

    @property
    def strict(self) -> bool:
        """Recorded decisions (fallbacks, non-finite rows) become errors (0|1|true|false|on|off)."""

    @property
    def threads(self) -> int | None:
        """Threads of the CPU backend; auto: one for each core that this process may use
        (auto|1..4096).
        """

    @property
    def numa(self) -> int | Literal["off"] | None:
        """Memory nodes that rows of weights are dealt to; auto: those of the machine; a number it
        does not have: groups of CPUs (auto|off|1..64).
        """

    @property
    def cpu_isa(self) -> str | None:
        """Instruction set of the CPU kernels; auto: the best one present
        (auto|scalar|avx2|avxvnni|avx512vnni|amx|neon).
        """

    @property
    def backend(self) -> str | None:
        """Backend to use; auto: that of the device asked for (auto|cpu|cuda|metal)."""

    @property
    def cuda_plugin(self) -> str | None:
        """The CUDA plug-in, read once per process; auto: the one installed beside the library
        (auto, or a path).
        """

    @property
    def log(self) -> _Log:
        """Least severe message that reaches the log (off|error|warn|info|debug)."""

    @property
    def poison(self) -> bool:
        """Fill workspaces with NaN before each call (0|1|true|false|on|off)."""

    def to_dict(self) -> dict[str, Any]:
        """Return all knobs by name, as JSON takes them."""

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Tuning:
        """Return what ``to_dict`` gave, as it is or out of JSON.

        Parameters
        ----------
        fields : mapping
            Values by the names of the fields; those left out have their defaults.

        Returns
        -------
        Tuning

        Raises
        ------
        TypeError
            A name that is no field; the message has the nearest one.
        ConfigError
            As the constructor.
        """

    def replace(self, **changes: Unpack[_TuningKnobs]) -> Tuning:
        """Return a copy with some knobs changed.

        Raises
        ------
        ConfigError
            An unknown knob, or a value out of range.
        """

    def __eq__(self, other: object, /) -> bool:
        """Return whether all knobs are equal."""

    def __hash__(self) -> int: ...
    def __repr__(self) -> str: ...

@final
class ConfigEntry:
    """One knob as ``show_config`` lists it."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def knob(self) -> str:
        """Name in ``Tuning``."""

    @property
    def variable(self) -> str:
        """Environment variable."""

    @property
    def value(self) -> str:
        """Value in effect, as text."""

    @property
    def source(self) -> Literal["default", "environment", "tuning"]:
        """Where the value comes from."""

    @property
    def help(self) -> str:
        """What it does and accepts."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as JSON takes them."""

    def __eq__(self, other: object, /) -> bool:
        """Return whether all fields are equal."""

    def __hash__(self) -> int: ...
    def __repr__(self) -> str: ...

@final
class ZoneTotal:
    """Time spent in one step of the forward."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def calls(self) -> int:
        """How often it ran."""

    @property
    def nanoseconds(self) -> int:
        """Time of all calls together."""

    @property
    def seconds(self) -> float:
        """Time of all calls together."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as JSON takes them."""

    def __eq__(self, other: object, /) -> bool:
        """Return whether all fields are equal."""

    def __hash__(self) -> int: ...
    def __repr__(self) -> str: ...

@final
class Profile:
    """What ``profile`` collects: zones, counters and a trace.

    Parameters
    ----------
    mode : str
        'counters' keeps totals only; 'events' keeps every zone, for the trace; 'sync' does too,
        and waits for the device at the end of each zone.

    Raises
    ------
    ConfigError
        An unknown mode.
    """

    def __init__(self, mode: _ProfileMode = "events") -> None: ...
    @property
    def zones(self) -> dict[str, ZoneTotal]:
        """Time by zone, of the zones that ran."""

    @property
    def counters(self) -> dict[str, int]:
        """Counts by name, such as calls, tokens and pairs."""

    def chrome_trace(self) -> str:
        """Return the events as Chrome trace-event JSON."""

    def save_chrome_trace(self, path: _Path) -> None:
        """Write the events for chrome://tracing or Perfetto.

        Parameters
        ----------
        path : str or path-like
            A file, which is overwritten.

        Raises
        ------
        OSError
            It cannot be written.
        """

    def reset(self) -> None:
        """Forget everything collected."""

    def __repr__(self) -> str: ...

@final
class KernelInfo:
    """One kernel of a backend."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def operation(self) -> str:
        """What it computes."""

    @property
    def type(self) -> str:
        """Element type of the weights, as ggml spells it."""

    @property
    def layout(self) -> str:
        """How the weights lie in memory, such as 'rows' or 'panels'."""

    @property
    def isa(self) -> str:
        """Instruction set."""

    @property
    def name(self) -> str:
        """Its name, made of the facts above."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as JSON takes them."""

    def __eq__(self, other: object, /) -> bool:
        """Return whether all fields are equal."""

    def __hash__(self) -> int: ...
    def __repr__(self) -> str: ...

@final
class BackendInfo:
    """One backend, present or not."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def name(self) -> str:
        """'cpu', 'cuda' or 'metal'."""

    @property
    def available(self) -> bool:
        """Whether it can be used."""

    @property
    def reason(self) -> str:
        """Why it cannot, or ''."""

    @property
    def devices(self) -> list[str]:
        """Its devices, as ``MoeLayer.from_gguf`` takes them."""

    @property
    def detail(self) -> str:
        """More about it, such as the instruction set in use."""

    @property
    def kernels(self) -> list[KernelInfo]:
        """All its kernels."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, as JSON takes them."""

    def __eq__(self, other: object, /) -> bool:
        """Return whether all fields are equal."""

    def __hash__(self) -> int: ...
    def __repr__(self) -> str: ...

def backends() -> list[BackendInfo]:
    """Return all backends, the CPU first; absent ones say why.

    Examples
    --------
    >>> import moesaic as mo
    >>> mo.backends()[0].name
    'cpu'
    """

def explain(layer: MoeLayer, num_tokens: int = 8) -> dict[str, str]:
    """Return what a call would do under the current tuning, as ``moesaic.explain``."""

def explain_matrix(matrix: QuantMatrix, num_rows: int = 8) -> dict[str, str]:
    """Return what a call would do under the current tuning, as ``moesaic.explain``."""

def show_config() -> list[ConfigEntry]:
    """Return every knob with value and source, as ``moesaic.show_config``."""

def borrow_openmp(library: str) -> bool:
    """Let calls work on threads of the OpenMP runtime that a loaded library depends on.

    They do where the runtime has as many threads for the caller as the call wants. Returns whether
    there is such a runtime; it stays in use until the process ends.
    """

def current_tuning() -> Tuning:
    """Return the tuning that calls here and now run with.

    Raises
    ------
    ConfigError
        The environment has a bad value.

    Examples
    --------
    >>> import moesaic as mo
    >>> with mo.tuning(threads=1):
    ...     mo.current_tuning().threads
    1
    """

version: str  #: of the library; asks for nothing else, other than build_info

def build_info() -> dict[str, str]:
    """Return facts of the compiled module and of what it finds here.

    Returns
    -------
    dict of str to str
        version, compiler, build_type; threads, how many a call uses when none are asked for; numa,
        the nodes that weights are dealt to under the current tuning, and why these.
    """

def measure_bandwidth(threads: int = 0) -> float:
    """Return how fast memory is read, in GB/s.

    Parameters
    ----------
    threads : int
        Threads that read 512 MiB together; 0: one per CPU.

    Returns
    -------
    float
    """

def measure_dot_peak(threads: int = 0) -> float:
    """Return the rate of 8-bit dot products, in 10^9 operations per second.

    Parameters
    ----------
    threads : int
        Threads that multiply; 0: one per CPU.

    Returns
    -------
    float
        A multiply-add counts as two operations.
    """

def quantize(
    values: _AnyArray, quant: str, *, weights: _AnyArray | None = None
) -> npt.NDArray[np.uint8]:
    """Encode weights row by row, as the bytes of a GGUF tensor; 'E4M3' as a stack keeps FP8.

    The encoders search for the scales that leave the smallest squared error. Rows are shared out to
    the threads of the tuning; the bytes depend neither on their number nor on the processor. Ctrl-C
    ends the call.

    Parameters
    ----------
    values : f32, f16 or bf16 array [..., cols]
        With 1 to 4 dimensions. Finite, and at most 65504 in magnitude (NVFP4: 2688, MXFP4:
        2.55e38, E4M3: 1.7e38). 'F32', 'F16' and 'BF16' convert all values.
    quant : str
        Element type as ggml spells it, such as 'Q4_K', or 'E4M3'. ``testing.quant_types()`` lists
        them.
    weights : f32 array [cols] or [..., cols], optional
        Importance of each value, 0 or more: what its squared error counts, such as the mean square
        of the activations of a column (the "importance matrix" of llama.cpp). It broadcasts as in
        numpy: [E, 1, cols] has one row for each expert of [E, rows, cols]. For Q4_0 to Q5_1 and the
        K and IQ types.

    Returns
    -------
    uint8 array [..., row bytes]
        As the ``gguf`` package keeps quantised tensors.

    Raises
    ------
    ConfigError
        An unknown type; a value that is not finite or too large, with its position.
    UnsupportedError
        A type without an encoder, or ``weights`` for a type that takes none.
    ShapeError, DTypeError
        An array does not fit, or cols is not a multiple of the type's block.

    Examples
    --------
    >>> import moesaic as mo, numpy as np
    >>> data = mo.quantize(np.ones((2, 256), np.float32), "Q4_K")
    >>> data.shape
    (2, 144)
    >>> mo.dequantize(data, "Q4_K").shape
    (2, 256)
    """

def dequantize(
    data: _AnyArray, quant: str, shape: Sequence[int] | None = None
) -> npt.NDArray[np.float32]:
    """Decode the bytes of a GGUF tensor, exactly as ggml does.

    Parameters
    ----------
    data : array [..., row bytes]
        The bytes, dense; an array of a wider type stands for its bytes.
    quant : str
        Element type as ggml spells it, such as 'Q4_K'.
    shape : sequence of int, optional
        Sizes in elements, outermost first. None: those of ``data``, with as many columns as its
        rows hold.

    Returns
    -------
    f32 array [..., cols]

    Raises
    ------
    ConfigError
        An unknown type.
    UnsupportedError
        A type without a decoder.
    ShapeError
        Rows that do not end with a block, or another number of bytes than ``shape`` needs.
    """

def quant_types() -> dict[str, dict[str, Any]]:
    """Return facts of every known element type, as ``moesaic.testing.quant_types``."""
