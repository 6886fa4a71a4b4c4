"""What the benchmarks time with: CPU time on a CPU, where the machine may do other work; the wall's on a GPU,
when it is done."""

import time
from collections.abc import Callable

import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
now = time.perf_counter if CUDA else time.process_time


def seconds(call: Callable[[], object]) -> float:
    if CUDA:
        torch.cuda.synchronize()
    start = now()
    call()
    if CUDA:
        torch.cuda.synchronize()
    return now() - start


def device_name(device: torch.device) -> str:
    threads = f"{torch.get_num_threads()} threads"
    return f"{device} ({torch.cuda.get_device_name(device) if device.type == 'cuda' else threads})"
