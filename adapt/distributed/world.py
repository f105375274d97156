"""The processes of a run: found (torchrun, srun) or started here, one path from one CPU process to many nodes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from adapt.errors import UserError

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others within a step."""
PATIENCE = timedelta(days=2)
"""How long they wait while rank 0 works alone: preparing data, exporting. If it dies, they notice at once."""


@dataclass(frozen=True)
class World:
    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None
    """All ranks, on the CPU, with PATIENCE."""

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def grouped(self) -> bool:
        """Whether there is a process group (several processes, or a GPU, where FSDP2 does the mixed precision)."""
        return dist.is_initialized()

    def barrier(self) -> None:
        if self.size > 1:
            self.sum([0])

    def sum(self, numbers: list[int] | list[float]) -> list:
        """Add up host numbers over all ranks, on the CPU group: no GPU waits for it. Integers stay exact."""
        if self.size == 1:
            return list(numbers)
        exact = all(isinstance(n, int) for n in numbers)
        tensor = torch.tensor(numbers, dtype=torch.int64 if exact else torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def least(self, number: int) -> int:
        """The smallest over all ranks."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)

    def wait(self, failed: bool = False) -> bool:
        """Until every rank is here, however long rank 0 works alone. Whether any of them failed."""
        if self.size == 1:
            return failed
        tensor = torch.tensor(int(failed))
        dist.all_reduce(tensor, group=self.patient)
        return bool(tensor)

    def add_up(self, values: Tensor) -> Tensor:
        """Sum a small tensor over all ranks, on its own device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


def on_main(world: World, work: Callable[[], T]) -> T | None:
    """Run `work` on rank 0 while the others wait. An error of the user's is raised there and told once: the other ranks
    leave without a word."""
    result, error = None, None
    if world.main:
        try:
            result = work()
        except UserError as raised:
            error = raised
    failed = world.wait(error is not None)
    if error is not None:
        raise error
    if failed:
        raise SystemExit(0)  # rank 0 has the exit code that counts
    return result


def from_main(value: T) -> T:
    """Rank 0's value on every rank (something small that can be pickled); collective where there are several."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def start(devices: int | str) -> World:
    """Join the processes torchrun or srun started, or start `devices` of them on this machine. Call once."""
    cuda = torch.cuda.is_available()
    if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        _from_slurm()
    if "WORLD_SIZE" not in os.environ:
        count = (torch.cuda.device_count() if cuda else 1) if devices == "auto" else int(devices)
        if count > 1 or cuda:
            _spawn(count)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    # srun --gpus-per-task=1 shows each task its own GPU only: number 0, whatever the local rank
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    patient = None
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=COLLECTIVE_TIMEOUT)
    if dist.is_initialized():
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    return World(rank, local_rank, size, local_size, device, patient)


def place_of_its_own(turn: int) -> dict[str, str]:
    """Environment for the `turn`-th process that each rank of torchrun or srun starts in its own place, one after the
    other: their ranks must not meet where those of the turn before did. Empty for a single process."""
    if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        _from_slurm()
    if "WORLD_SIZE" not in os.environ:
        return {}
    # torchrun's own store keeps the addresses of the turn before, so rank 0 makes one
    port = int(os.environ["MASTER_PORT"]) + 1 + turn
    return {"MASTER_PORT": str(port if port < 2**16 else port - 2**15), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _from_slurm() -> None:
    nodes = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    tasks, node_count = int(os.environ["SLURM_NTASKS"]), len(nodes)
    os.environ.setdefault("MASTER_ADDR", nodes[0])
    os.environ.setdefault("MASTER_PORT", str(15000 + int(os.environ["SLURM_JOB_ID"]) % 10000))
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        WORLD_SIZE=str(tasks),
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(tasks // node_count),
        GROUP_RANK=os.environ["SLURM_NODEID"],
    )


def _spawn(count: int) -> None:
    """This process becomes rank 0; the others run the same command. If one of them dies, this one goes too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
    }
    children = []
    for rank in range(1, count):
        environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "adapt", *sys.argv[1:]]
        children.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    os.environ.update(common, RANK="0", LOCAL_RANK="0")
    for rank, child in enumerate(children, 1):
        threading.Thread(target=_watch, args=(child, rank), daemon=True).start()


def _watch(child: subprocess.Popen, rank: int) -> None:
    code = child.wait()
    if code not in (0, 75):
        print(f"rank {rank} ended with exit code {code}; stopping. Its message stands above.", file=sys.stderr)
        sys.stderr.flush()
        os._exit(code if code in (1, 2) else 1)
