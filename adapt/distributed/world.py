"""The processes of a run: found (torchrun, srun) or started here, one path from one CPU process to many nodes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from adapt.distributed import meeting
from adapt.distributed.watch import Watch
from adapt.errors import RankLost, StopRequested, UserError

if TYPE_CHECKING:
    from adapt.train.signals import StopFlag

T = TypeVar("T")

MARGIN = timedelta(minutes=2)
"""How much longer than `trainer.timeout` collectives themselves wait: the watch names the missing rank before."""
PATIENCE = timedelta(days=2)
"""How long they wait while rank 0 works alone: preparing data, exporting. If it dies, the watch notices."""

POLL = 0.05
"""Seconds between two looks whether rank 0 is done."""


@dataclass(frozen=True)
class World:
    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    patient: dist.ProcessGroup | None = None
    """All ranks, on the CPU, with PATIENCE."""
    watch: Watch | None = None
    """Of several ranks."""

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
        with self._coming():
            dist.all_reduce(tensor)
        return tensor.tolist()

    def least(self, number: int) -> int:
        """The smallest over all ranks."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number)
        with self._coming():
            dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return int(tensor)

    def wait(self, outcome: int = 0) -> int:
        """Until every rank is here, however long rank 0 works alone. The largest outcome of all ranks."""
        if self.size == 1:
            return outcome
        tensor = torch.tensor(outcome)
        with self._coming(patient=True):
            work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.patient, async_op=True)
            while not work.is_completed():  # in Python: signals are handled meanwhile
                time.sleep(POLL)
            work.wait()
        return int(tensor)

    def add_up(self, values: Tensor) -> Tensor:
        """Sum a small tensor over all ranks, on its own device."""
        if self.size > 1:
            with self._coming():
                dist.all_reduce(values)
        return values

    def at(self, phase: str, step: int = 0) -> None:
        """For the watch: what this rank does now."""
        if self.watch is not None:
            self.watch.at(phase, step)

    def _coming(self, patient: bool = False) -> AbstractContextManager[None]:
        return nullcontext() if self.watch is None else self.watch.collective(patient)


FINE, FAILED, STOPPED = 0, 1, 2


def on_main(world: World, work: Callable[[], T], flag: StopFlag | None = None) -> T | None:
    """Run `work` on rank 0 while the others wait. An error of the user's is raised there and told once: the other ranks
    leave without a word. With `flag`, a signal cuts the work off, and every rank raises StopRequested."""
    result, outcome, error = None, FINE, None
    if world.main:
        try:
            with nullcontext() if flag is None else flag.at_once("while rank 0 worked alone; nothing was to be saved"):
                result = work()
        except UserError as raised:
            outcome, error = FAILED, raised
        except StopRequested as raised:
            outcome, error = STOPPED, raised
    outcome = world.wait(outcome)
    if error is not None:
        raise error
    if outcome == STOPPED:
        raise StopRequested("stopped with rank 0")
    if outcome == FAILED:
        raise SystemExit(0)  # rank 0 has the exit code that counts
    return result


def from_main(value: T) -> T:
    """Rank 0's value on every rank (something small that can be pickled); collective where there are several."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class Failed(RuntimeError):
    """Of `together`: the work failed on a rank, as all of them know. None is missing."""


def together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """What `work` returns on every rank (something small that can be pickled), when all are done. Where any of them fails,
    all do: with the error itself on its own rank (of a plain RuntimeError, a Failed), with a Failed that quotes it on the
    others. Collective; another RuntimeError means that a rank is missing."""
    try:
        mine: tuple[Any, Exception | None] = work(), None
    except Exception as error:
        mine = None, error
    if not dist.is_initialized():
        told = [(mine[0], mine[1] and str(mine[1]))]
    else:
        told = [(None, None)] * dist.get_world_size(group)
        dist.all_gather_object(told, (mine[0], mine[1] and f"rank {dist.get_rank()}: {mine[1]}"), group)
    if type(mine[1]) is RuntimeError:
        raise Failed(str(mine[1])) from mine[1]
    if mine[1] is not None:
        raise mine[1]
    for _, error in told:
        if error is not None:
            raise Failed(error)
    return [result for result, _ in told]


def start(devices: int | str, timeout: float = 600, flag: StopFlag | None = None, wait: float = meeting.WAIT) -> World:
    """Join the processes torchrun or srun started, or start `devices` of them on this machine. Call once. `timeout`:
    seconds that ranks wait for each other within a step; `flag`: set on all ranks when it is on one; `wait`: seconds for
    all to come. Raises RankLost with those that did not, or died on the way."""
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
    if "WORLD_SIZE" not in os.environ:
        return World(rank, local_rank, size, local_size, device)
    if cuda:
        torch.cuda.set_device(device)
    store = meeting.store(rank, size, wait, flag)
    if size == 1:
        patient = _groups(cuda, store, rank, size, timeout)
        return World(rank, local_rank, size, local_size, device, patient)
    watch = Watch(rank, size, timeout, store, flag)
    meeting.gather(watch, wait, flag)
    watch.start()
    with naming_the_lost(watch):
        world = World(rank, local_rank, size, local_size, device, _groups(cuda, store, rank, size, timeout), watch)
        world.barrier()
    return world


def _groups(cuda: bool, store: dist.Store, rank: int, size: int, timeout: float) -> dist.ProcessGroup:
    """The process group of the run; returns the patient one."""
    backend, limit = "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(seconds=timeout) + MARGIN
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    return dist.new_group(backend="gloo", timeout=PATIENCE)


@contextmanager
def naming_the_lost(watch: Watch | None) -> Iterator[None]:
    """Around collectives before the run has a folder: their errors are raised as RankLost with the ranks that are missing."""
    try:
        yield
    except RuntimeError as error:
        told = error if watch is None else watch.explain(error)
        if told is error:
            raise
        raise told from None


def on_loss(world: World, tell: Callable[[int, str], None]) -> None:
    """`tell(exit code, reason)` before this process ends because another rank did."""
    _last_words[:] = [tell]
    if world.watch is not None:
        world.watch.lost = tell


_last_words: list[Callable[[int, str], None]] = []


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
    if code in (0, 75):
        return
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}; its message stands above"
    print(f"rank {rank} {how}; stopping. Go on with --resume.", file=sys.stderr, flush=True)
    code = code if code in (1, 2) else RankLost.exit_code
    for tell in _last_words:
        tell(code, f"rank {rank} {how}")
    os._exit(code)
