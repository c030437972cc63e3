"""What every section of the benchmark needs: a clock, a table, and what the machine can do."""

import os
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from brainsex import networks

FLAGS = "avx2 avx512f avx512_bf16 amx_bf16".split()  # of /proc/cpuinfo, and what is faster by them


class Table:
    """Rows (section, what, unit, ours, baseline, share of the peak), printed as they come."""

    def __init__(self):
        self.rows: list[dict] = []

    def add(self, section, what, unit, ours, baseline=None, share=None):
        ratio = baseline / ours if baseline is not None and unit == "s" else None
        row = dict(section=section, what=what, unit=unit, ours=ours, baseline=baseline)
        self.rows.append(row | {"ratio": ratio, "share_of_peak": share})
        cells = [what, unit, *map(_figure, (ours, baseline, ratio)), share and f"{share:.0%}"]
        print("| " + " | ".join(cell or "" for cell in cells) + " |", flush=True)

    @staticmethod
    def heading(text: str) -> None:
        print(f"\n{text}\n\n| what | unit | ours | baseline | baseline / ours | of peak |")
        print("| --- | --- | ---: | ---: | ---: | ---: |", flush=True)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def seconds(function: Callable, repeats: int = 3) -> float:
    """The shortest of some runs: on a shared machine the one least disturbed."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def operations(function: Callable) -> int:
    """Floating-point operations of a call, as PyTorch counts those of convolutions and products."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peaks(device: torch.device, table: Table) -> dict[torch.dtype, float]:
    """Operations a second of a large matrix product: what the machine can do."""
    size, rates = (8192 if device.type == "cuda" else 2048), {}
    table.heading("Machine: a large matrix product in the precision that is used, against float32")
    for dtype in dict.fromkeys((torch.float32, networks.fast_precision(device))):
        matrix = torch.randn(size, size, device=device).to(dtype)
        taken = seconds(lambda matrix=matrix: matrix @ matrix, 5)
        rates[dtype] = 2 * size**3 / taken
        what = f"{size} x {size}, {str(dtype)[6:]}: {rates[dtype] / 1e9:.0f} GFLOP/s"
        table.add("machine", what, "s", taken, 2 * size**3 / rates[torch.float32])
    return rates


def machine() -> dict:
    """What the figures depend on; no name of a machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), ())
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return {
        "date": date.today().isoformat(),
        "cpu": model or platform.machine(),
        "instructions": " ".join(flag for flag in FLAGS if flag in flags) or "unknown",
        "used": os.environ.get("DNNL_MAX_CPU_ISA", torch.backends.cpu.get_cpu_capability()),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "precision": str(networks.fast_precision(networks.device())),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
