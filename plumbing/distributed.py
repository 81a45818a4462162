"""One process or several (torchrun): who takes which rows, and what they tell each other."""

import os
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
from torch import distributed

from util import InputError

PATIENCE = timedelta(days=7)  # to wait for others: folds side by side end hours apart, and the leader scores alone


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" takes CUDA, then Apple's MPS, then the CPU."""
    if name == "auto":
        found = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()]
        name = found[0] if found else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used ({str(error).splitlines()[0]}); pass cpu") from None
    return torch.device(name)


@dataclass(frozen=True)
class Team:
    """The processes that train a fold together, and which of them this one is."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: str) -> "Team":
        """Join all processes that torchrun started."""
        rank, size, picked = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), pick_device(device)
        if size > 1:
            if picked.type == "cuda":
                picked = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
                torch.cuda.set_device(picked)
            distributed.init_process_group("nccl" if picked.type == "cuda" else "gloo", timeout=PATIENCE)
        return cls(picked, rank, size)

    def wait(self) -> None:
        """Wait for the other processes of the team."""
        if self.size > 1:
            distributed.barrier()

    def leave(self) -> None:
        """Wait for the others and part."""
        self.wait()
        if self.size > 1:
            distributed.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def rows(self, n_rows: int) -> range:
        """Rows of a table that this process predicts; none if there are fewer rows than processes."""
        return range(self.rank, n_rows, self.size)

    def gather(self, prob: np.ndarray, n_rows: int) -> np.ndarray:
        """Predictions of all rows (n_rows, K) from every process's rows."""
        if self.size == 1:
            return prob
        parts: list = [None] * self.size
        distributed.all_gather_object(parts, prob)
        whole = np.empty((n_rows, prob.shape[1]))
        for rank, part in enumerate(parts):
            whole[rank :: self.size] = part
        return whole

    def mean(self, value: float) -> float:
        """Mean of the processes' values."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return total.item() / self.size

    def sync_buffers(self, *networks: torch.nn.Module) -> None:
        """Give all processes the leader's buffers: batch norm statistics differ by what each process saw."""
        if self.size > 1:
            for network in networks:
                for buffer in network.buffers():
                    distributed.broadcast(buffer, 0)

    def from_leader(self, value):
        """The leader's value, in all processes."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box)
        return box[0]
