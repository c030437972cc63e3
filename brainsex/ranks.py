"""Work shared by the processes that PyTorch's launcher starts: ``torchrun … -m brainsex COMMAND``.

Shared are whole folds and whole subjects. No gradient is, so the result is that of one process.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import joblib
import torch
from torch import distributed

WAIT = timedelta(days=14)
"""For the slowest process, whose last fold may take hours; its milliseconds must fit 32 bits."""


def launched() -> bool:
    """Whether the launcher started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def joined() -> Iterator[None]:
    """With the launcher's other processes, a GPU of one's own and a part of the cores.

    To be entered before CUDA is used. Where there are fewer GPUs than processes, some share one.
    """
    if gpus := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        own = visible.split(",")[int(os.environ["LOCAL_RANK"]) % gpus]
        os.environ["CUDA_VISIBLE_DEVICES"] = own
    torch.set_num_threads(max(1, joblib.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
    try:
        distributed.init_process_group("gloo", timeout=WAIT)
    except RuntimeError as error:
        raise ConnectionError(f"the processes do not find each other ({error}).") from error
    try:
        yield
    finally:
        distributed.destroy_process_group()  # its threads would abort a process that ends with them


def number() -> int:
    """This process's, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def first() -> bool:
    """Whether this is the process that prepares folders, merges tables and prints."""
    return number() == 0


def beside() -> int:
    """How many processes of this run share the machine, this one included."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if distributed.is_initialized() else 1


def mine(items: Sequence) -> Sequence:
    """This process's share; all of it where there is one process."""
    if not distributed.is_initialized():
        return items
    return items[number() :: distributed.get_world_size()]


def gather(own: object = None) -> list:
    """What each process brings, once all are here.

    Raises
    ------
    ConnectionError
        Another process has stopped.
    """
    if not distributed.is_initialized():
        return [own]
    found = [None] * distributed.get_world_size()
    try:
        distributed.all_gather_object(found, own)
    except RuntimeError as error:
        raise ConnectionError(
            "another process has stopped, and said why. Start again: what is finished is kept."
        ) from error
    return found
