"""The transports: what a layer needs of torch.distributed or MPI, in one shape.

Both move bytes in host memory. Nothing of a transport is made here: torch's process groups and
MPI's communicators do all of it, and end a collective that takes too long.
"""

from __future__ import annotations

import datetime
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from moesaic import _core
from moesaic._errors import error_of

if TYPE_CHECKING:
    import mpi4py.MPI
    import torch.distributed

Bytes: TypeAlias = npt.NDArray[np.uint8]

#: Seconds in which an MPI collective is asked for its end without a pause.
_BUSY = 0.1
#: How many groups of the same ranks of torch there are.
_made: Counter[str] = Counter()


class Group(Protocol):
    """What a layer asks of a transport. All ranks make the same calls in the same order.

    A collective raises any exception when a rank does not take part within the timeout.
    """

    rank: int
    """This process, 0 to size - 1."""
    size: int
    """R."""
    timeout: float
    """Seconds after which a collective ends with an error."""
    keeper: int
    """The rank without which ``report`` and ``reports`` raise; -1: there is none such."""

    def exchange(self, sends: Sequence[Bytes], sizes: Sequence[int]) -> list[Bytes]:
        """Give each rank its bytes, and return what each of them gave, of known sizes."""

    def allgather(self, row: Bytes) -> Bytes:
        """Return the rows [R, n] of all ranks, which have one length."""

    def report(self, event: str, text: str) -> None:
        """Leave a line for the other ranks, which need not be there. Only called after an error."""

    def reports(self, event: str) -> dict[int, str]:
        """Return what other ranks left about an event so far, by rank."""


def _missing(operation: str, module: str) -> _core.UnsupportedError:
    return error_of(
        _core.UnsupportedError, operation, module, "it installed", "no such module",
        f"pip install {module}",
    )  # fmt: skip


def _check_timeout(operation: str, timeout: float) -> float:
    if not 0 < timeout < 1e6:
        raise error_of(_core.ConfigError, operation, "timeout", "seconds above 0", str(timeout))
    return float(timeout)


class TorchGroup:
    """The ranks of torch.distributed, or of one of its process groups.

    It makes a process group of its own, so that its timeout holds and its messages meet no others.
    All ranks make it together, once for all layers.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        Some ranks; None: all of them (``torch.distributed.init_process_group`` has been called).
    timeout : float
        Seconds that a rank waits for the others.
    backend : str
        'gloo', which moves bytes between host memories, or 'nccl', where these go through the
        current GPU of each rank.

    Raises
    ------
    UnsupportedError
        torch is missing.
    ConfigError
        torch.distributed is not initialised, or this process is not in the group.
    """

    def __init__(
        self,
        group: torch.distributed.ProcessGroup | None = None,
        *,
        timeout: float = 30.0,
        backend: str = "gloo",
    ) -> None:
        operation = "TorchGroup"
        try:
            import torch
            import torch.distributed as dist
        except ImportError as error:
            raise _missing(operation, "torch") from error
        if not dist.is_available() or not dist.is_initialized():
            raise error_of(
                _core.ConfigError, operation, "torch.distributed", "initialised ranks", "none",
                "torch.distributed.init_process_group('gloo') under torchrun",
            )  # fmt: skip
        self.timeout = _check_timeout(operation, timeout)
        ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        if dist.get_rank() not in ranks:
            expected = f"one of ranks {ranks}"
            raise error_of(_core.ConfigError, operation, "group", expected, str(dist.get_rank()))
        self.rank, self.size = ranks.index(dist.get_rank()), len(ranks)
        kinds = {"gloo": "ProcessGroupGloo", "nccl": "ProcessGroupNCCL"}
        kind = getattr(dist, kinds.get(backend, ""), None)
        if kind is None:
            expected = "gloo or nccl, where this torch has it"
            raise error_of(_core.ConfigError, operation, "backend", expected, repr(backend))
        self._torch = torch
        self._device = torch.device("cuda") if backend == "nccl" else torch.device("cpu")
        # torchrun keeps the store that ranks meet in, or else rank 0 of all.
        outside = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.keeper = -1 if outside or 0 not in ranks else ranks.index(0)
        # dist.new_group needs all ranks of the program, or that all made as many groups before. A
        # group of its own needs its ranks alone, who meet under the number of their groups.
        names = "-".join(map(str, ranks))
        _made[names] += 1
        self._store = dist.PrefixStore(
            f"moesaic/{names}/{_made[names]}", dist.distributed_c10d._get_default_store()
        )
        self._group: Any = kind(
            dist.PrefixStore("group", self._store), self.rank, self.size,
            timeout=datetime.timedelta(seconds=self.timeout),
        )  # fmt: skip

    def exchange(self, sends: Sequence[Bytes], sizes: Sequence[int]) -> list[Bytes]:
        """Give each rank its bytes, and return what each of them gave, of known sizes."""
        torch = self._torch
        send = torch.from_numpy(np.concatenate([*sends, np.zeros(0, np.uint8)])).to(self._device)
        receive = torch.empty(int(sum(sizes)), dtype=torch.uint8, device=self._device)
        counts, lengths = [int(n) for n in sizes], [len(one) for one in sends]
        self._group.alltoall_base(receive, send, counts, lengths).wait()
        ends = np.cumsum(sizes)[:-1]
        return list(np.split(receive.cpu().numpy(), ends))

    def allgather(self, row: Bytes) -> Bytes:
        """Return the rows [R, n] of all ranks, which have one length."""
        torch = self._torch
        send = torch.from_numpy(row).to(self._device)
        receive = torch.empty(self.size * len(row), dtype=torch.uint8, device=self._device)
        self._group._allgather_base(receive, send).wait()
        gathered: Bytes = receive.cpu().numpy().reshape(self.size, len(row))
        return gathered

    def report(self, event: str, text: str) -> None:
        """Leave a line in the store that the ranks met in."""
        self._store.set(f"{event}/{self.rank}", text)

    def reports(self, event: str) -> dict[int, str]:
        """Return what other ranks left about an event so far, by rank."""
        found: dict[int, str] = {}
        for rank in range(self.size):
            key = f"{event}/{rank}"
            if rank != self.rank and self._store.check([key]):
                found[rank] = self._store.get(key).decode(errors="replace")
        return found


class MpiComm:
    """The ranks of an MPI communicator, of mpi4py.

    All ranks make it together, once for all layers. Collectives are those that do not block, so
    that one which takes too long is an error here and not the end of the program.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm, optional
        None: ``MPI.COMM_WORLD``. It is duplicated, so that messages meet no others.
    timeout : float
        Seconds that a rank waits for the others.

    Raises
    ------
    UnsupportedError
        mpi4py is missing.
    """

    _TAG = 7

    def __init__(self, comm: mpi4py.MPI.Comm | None = None, *, timeout: float = 30.0) -> None:
        operation = "MpiComm"
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise _missing(operation, "mpi4py") from error
        self.timeout = _check_timeout(operation, timeout)
        self._mpi: Any = MPI
        self._comm: Any = (MPI.COMM_WORLD if comm is None else comm).Dup()
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        self.keeper = -1
        self._sent: list[Any] = []  # buffers of messages on their way
        self._heard: dict[str, dict[int, str]] = {}

    def _wait(self, request: Any) -> None:
        """Until the request is complete. Raises TimeoutError."""
        start = time.monotonic()
        while not request.Test():
            waited = time.monotonic() - start
            if waited > self.timeout:
                raise TimeoutError(f"no end after {self.timeout:g} s")
            # MPI moves bytes while it is asked, and waits without a pause itself.
            if waited > _BUSY:
                time.sleep(1e-4)

    def exchange(self, sends: Sequence[Bytes], sizes: Sequence[int]) -> list[Bytes]:
        """Give each rank its bytes, and return what each of them gave, of known sizes."""
        send = np.concatenate([*sends, np.zeros(0, np.uint8)])
        receive = np.empty(int(sum(sizes)), np.uint8)
        lengths, counts = [len(one) for one in sends], [int(n) for n in sizes]
        byte = self._mpi.BYTE
        self._wait(
            self._comm.Ialltoallv([send, lengths, None, byte], [receive, counts, None, byte])
        )
        return list(np.split(receive, np.cumsum(counts)[:-1]))

    def allgather(self, row: Bytes) -> Bytes:
        """Return the rows [R, n] of all ranks, which have one length."""
        receive = np.empty((self.size, len(row)), np.uint8)
        byte = self._mpi.BYTE
        self._wait(self._comm.Iallgather([row, byte], [receive, byte]))
        return receive

    def report(self, event: str, text: str) -> None:
        """Send a line to every other rank, whether it listens or not."""
        for rank in range(self.size):
            if rank != self.rank:
                self._sent.append(self._comm.isend((event, text), rank, self._TAG))

    def reports(self, event: str) -> dict[int, str]:
        """Return what other ranks sent about an event so far, by rank."""
        status = self._mpi.Status()
        while self._comm.iprobe(self._mpi.ANY_SOURCE, self._TAG, status):
            about, text = self._comm.recv(source=status.Get_source(), tag=self._TAG)
            self._heard.setdefault(about, {})[status.Get_source()] = text
        return dict(self._heard.get(event, {}))


_known: dict[tuple[int, float], tuple[Any, TorchGroup | MpiComm]] = {}


def group_of(group: Any, timeout: float, operation: str) -> Group:
    """A transport from what the caller has: one, a process group of torch, a communicator, None.

    One is made for all layers that are given the same group and timeout. Raises ConfigError where
    nothing says which ranks there are, DTypeError for another kind of object.
    """
    if isinstance(group, TorchGroup | MpiComm) or all(
        hasattr(group, name) for name in ("exchange", "allgather", "report", "reports")
    ):
        return group  # type: ignore[no-any-return]
    kind = type(group).__module__.partition(".")[0]
    torch = sys.modules.get("torch.distributed")
    # All ranks of torch.distributed are another group once it was initialised anew.
    same = torch.group.WORLD if group is None and torch is not None else group
    key = (id(same), timeout)
    if key not in _known:
        if group is None or kind == "torch":
            made: TorchGroup | MpiComm = TorchGroup(group, timeout=timeout)
        elif kind == "mpi4py":
            made = MpiComm(group, timeout=timeout)
        else:
            raise error_of(
                _core.DTypeError, operation, "group",
                "a TorchGroup, an MpiComm, a process group of torch or a communicator of mpi4py",
                type(group).__name__,
            )  # fmt: skip
        _known[key] = same, made  # which keeps the id from being another's
    return _known[key][1]
