"""The processes that train one model together, each on its own part of every batch (torch.distributed).

Two ranks, three samples each; what one rank knows of them, all ranks know afterwards, in the order of the ranks:

    rank 0 has [a, b, c], rank 1 has [d, e, f]      ranks.gathered(own) == [a, b, c, d, e, f] on both
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from compressor.errors import InputError, RanksError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
# How long a rank waits for the others: rank 0 prunes and fits layers alone, which may take long.
_PATIENCE = timedelta(hours=6)


class Ranks:
    """Talks to the other processes of a group; alone, it hands back what it gets.

    Args:
        group: of torch.distributed; None where this process trains alone. Every rank calls every method equally often.

    Attributes:
        group: as given.
        rank, size: this process's place, and how many there are.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = torch.distributed.get_rank(group) if group else 0
        self.size = torch.distributed.get_world_size(group) if group else 1
        # NCCL alone, as accelerate starts it, sends nothing that is not on a GPU.
        self._only_gpus = group is not None and torch.distributed.get_backend(group) in ("nccl", "cuda:nccl")

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes files."""
        return self.rank == 0

    def own_rows(self, everything: Tensor) -> Tensor:
        """Return this rank's part, `(B, ...)`, of what `gathered` would give, `(size * B, ...)`."""
        return everything.chunk(self.size)[self.rank]

    def gathered(self, own: Any) -> Any:
        """Return all ranks' samples: of every tensor `(B, ...)`, also inside of tuples and dicts, `(size * B, ...)`."""
        if self.group is None:
            return own

        def gather(tensor: Any) -> Any:
            if not isinstance(tensor, Tensor):
                return tensor
            sent = self._sendable(tensor.detach()).contiguous()
            sent = sent.view(torch.uint8) if sent.dtype is torch.bool else sent  # gloo sends no bools
            parts = [torch.empty_like(sent) for _ in range(self.size)]
            torch.distributed.all_gather(parts, sent, group=self.group)
            return torch.cat(parts).view(tensor.dtype).to(tensor.device)

        with _talking():
            return tree_map(gather, own)

    def _sendable(self, tensor: Tensor) -> Tensor:
        """Return a tensor where the group can send it from."""
        return tensor.cuda() if self._only_gpus else tensor

    def mean(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean of every tensor over the ranks."""
        if self.group is None:
            return dict(own)
        means = {name: tensor / self.size for name, tensor in own.items()}
        self.sum_(list(means.values()))
        return means

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over the ranks in place of every tensor; all of one kind travel together."""
        if self.group is None:
            return
        kinds: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        with _talking():
            for alike in kinds.values():
                flat = self._sendable(torch.cat([tensor.detach().reshape(-1) for tensor in alike]))
                torch.distributed.all_reduce(flat, group=self.group)
                parts = torch.split(flat, [tensor.numel() for tensor in alike])
                for tensor, part in zip(alike, parts, strict=True):
                    tensor.detach().copy_(part.view_as(tensor))

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Return of every flag whether a rank has it set."""
        if self.group is None:
            return list(flags)
        # On the CPU where that can be, so that no GPU is waited for.
        raised = self._sendable(torch.tensor(flags, dtype=torch.uint8))
        with _talking():
            torch.distributed.all_reduce(raised, torch.distributed.ReduceOp.MAX, group=self.group)
        return raised.bool().tolist()

    def of_the_first(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what rank 0 has, of the same names and shapes."""
        if self.group is None:
            return dict(own)
        taken = {name: self._sendable(tensor.clone()) for name, tensor in own.items()}
        with _talking():
            for tensor in taken.values():
                torch.distributed.broadcast(tensor, group=self.group, group_src=0)
        return {name: tensor.to(own[name].device) for name, tensor in taken.items()}

    def object_of_the_first(self, own: T) -> T:
        """Return what rank 0 has, whatever it is; the others give anything. Tensors in it are best on the CPU."""
        if self.group is None:
            return own
        taken = [own]
        with _talking():
            torch.distributed.broadcast_object_list(taken, group=self.group, group_src=0)
        return taken[0]

    def objects(self, own: T) -> list[T]:
        """Return what every rank has, in the order of the ranks."""
        found = [own] * self.size
        if self.group is not None:
            with _talking():
                torch.distributed.all_gather_object(found, own, group=self.group)
        return found

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let rank 0 go through this `with` first, and the others when it is out of it: it may download, say."""
        if not self.is_first:
            self.object_of_the_first(None)
        yield
        if self.is_first:
            self.object_of_the_first(None)

    def require_alike(self, what: str, tensors: Mapping[str, Tensor]) -> None:
        """Compare a hash of whole numbers over the ranks.

        Raises:
            InputError: they differ. Every rank raises it.
        """
        if self.group is None:
            return
        text = repr([(name, tensor.tolist()) for name, tensor in sorted(tensors.items())])
        if len(set(self.objects(hashlib.sha256(text.encode()).hexdigest()))) > 1:
            raise InputError(
                f"the {self.size} ranks have different {what}: begin on all of them with the same model, seed, "
                "options and calibration"
            )


@contextmanager
def _talking() -> Iterator[None]:
    """Say in words that another process is gone; torch's backends have a trace of sockets for it."""
    try:
        yield
    except RuntimeError as error:
        raise RanksError(str(error).strip().partition("\n")[0]) from error


@contextmanager
def launched(device: str) -> Iterator[Ranks]:
    """Give the processes that `torchrun` started with this one; alone, it is the only one.

    A process group that is there already is taken as it is. Otherwise one is made for this `with`: NCCL between GPUs,
    gloo between CPUs. "cuda" is a GPU of this process's own from here on.

    Raises:
        InputError: `device` names one GPU for several processes, or there are fewer GPUs than processes.
    """
    # By torchrun's variables: they are what every launcher of PyTorch sets.
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or torch.distributed.is_initialized():
        yield Ranks(torch.distributed.group.WORLD if torch.distributed.is_initialized() else None)
        return
    if device.startswith("cuda"):
        _take_gpu(device, int(os.environ.get("LOCAL_RANK", "0")))
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    # NOTE: torchrun's store outlives the processes, and those that it starts again would meet the addresses of the dead
    # (https://github.com/pytorch/pytorch/issues/135712): every start looks under a name of its own.
    shared, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"compressor/{start}", shared)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    try:
        yield Ranks(torch.distributed.group.WORLD)
    finally:
        torch.distributed.destroy_process_group()


def _take_gpu(device: str, place: int) -> None:
    if device != "cuda":
        raise InputError(f"--device {device}: every process of torchrun takes a GPU of its own; give --device cuda")
    if place >= torch.cuda.device_count():
        raise InputError(
            f"torchrun started {place + 1} processes or more here, and there are {torch.cuda.device_count()} GPUs: "
            "give --nproc-per-node gpu"
        )
    torch.cuda.set_device(place)
