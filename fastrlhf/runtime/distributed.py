"""The processes of a run that torchrun started. Without torchrun there is one, and nothing here communicates.

Every process goes through every step and knows all of it: prompts, responses, their log-probabilities, scores and
statistics. What they share is the work: the forward and backward passes. What one has computed is handed to all in the
order of the processes, so that each goes on with the same numbers, and results do not depend on how many there are,
but for the order of additions.

Losses are sums over a process's tokens, divided by the tokens of all, so gradients are added. That is done here and
not by torch's DistributedDataParallel, which adds them during backward: it must hold the module that is called,
takes the mean, and waits for ever when one process has fewer micro-batches than another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastrlhf.errors import MachineError, UserError
from fastrlhf.runtime.terminal import printable

T = TypeVar("T")
BUCKET = 64 * 2**20  # bytes of gradients that are added at once


def start() -> int:
    """Joins the processes that torchrun started, each on a GPU of its own where there are some; once only. Returns how
    many there are.

    Raises: ValueError for more processes on a machine than it has GPUs; RuntimeError when the others do not come."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        backend = "gloo"
        if torch.cuda.is_available():
            number, num_gpus = dist.get_node_local_rank(), torch.cuda.device_count()
            if number >= num_gpus:
                raise UserError(f"torchrun: process {number} of this machine has no GPU: torch sees {num_gpus}")
            torch.cuda.set_device(number)
            backend = "cpu:gloo,cuda:nccl"
        with _talking():
            dist.init_process_group(backend)
    return rank_and_world_size()[1]


def stop() -> None:
    """Leaves the other processes, when all is done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank_and_world_size() -> tuple[int, int]:
    """(number of this process from 0 up, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def world_size() -> int:
    """The number of processes."""
    return rank_and_world_size()[1]


def is_main_process() -> bool:
    """Whether this is the process that writes and prints."""
    return rank_and_world_size()[0] == 0


def print_once(text: object) -> None:
    """Prints a line, once for all processes; what a terminal would obey or hide is shown as an escape."""
    if is_main_process():
        print(printable(text), flush=True)


def local_shard(rows: Sequence[T]) -> Sequence[T]:
    """Returns this process's rows: neighbours, as many for each process, give or take one."""
    number, of = rank_and_world_size()
    return rows[number * len(rows) // of : (number + 1) * len(rows) // of]


def check_batch_divisible(batch_size: int, each: int) -> None:
    """Raises ValueError unless each process can answer as many prompts, with `each` of batch_size responses."""
    if batch_size % (world_size() * each):
        counts = f"{world_size()} processes x {each} samples_per_prompt"
        raise UserError(f"batch_size ({batch_size}) must be a multiple of {counts}")


def all_gather(value: T) -> list[T]:
    """Returns what each process gives, in their order. value: anything that pickles, tensors on the CPU."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with _talking():
        dist.all_gather_object(values, value)
    return values


def all_gather_cat(values: Tensor) -> Tensor:
    """Returns the values (N,) of all processes, end to end; N may differ."""
    return values if world_size() == 1 else torch.cat(all_gather(values.cpu())).to(values.device)


def all_reduce_sum(value: Tensor) -> Tensor:
    """Returns the sum of a tensor over the processes."""
    return value if world_size() == 1 else torch.stack(all_gather(value.cpu())).sum(0).to(value.device)


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Puts the sum over the processes in the place of each gradient; all processes have the same ones. Gradients of
    sharded parameters are sums already."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    for bucket in _buckets([gradient for gradient in gradients if not hasattr(gradient, "full_tensor")]):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        with _talking():
            dist.all_reduce(flat)
        for gradient, total in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(total.view_as(gradient))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in groups of one dtype and of about BUCKET bytes, so that their copies take little memory."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def _talking() -> Iterator[None]:
    """Says what it means when the other processes do not answer."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().rpartition("\n")[2].partition(". ")[0]
        raise MachineError(f"another process of the run has ended; its message says why ({reason})") from error
