"""Run a function in several processes, as torchrun would start them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import spawn

RANKS = 2


def launched(work: Callable[[Path], Any], folder: Path) -> list[Any]:
    """Return what every process returned."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_as_rank, (work, folder, port), RANKS)
    return [torch.load(folder / f"returned-{rank}.pt") for rank in range(RANKS)]


def _as_rank(rank: int, work: Callable[[Path], Any], folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    torch.save(work(folder), folder / f"returned-{rank}.pt")
    torch.distributed.destroy_process_group()
