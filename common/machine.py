"""What this machine has for this process: cores and memory."""

import ctypes
import os
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Literal

import psutil

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "float32", "bf16"]

CGROUP = Path("/sys/fs/cgroup")  # where Linux shows a container its own limits
# Files of the two generations: limit, use, statistics, and in these the name of what files in memory take.
CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_cache"),
)


def usable_cores() -> int:
    """Cores that this process may run on: under SLURM or in a container fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def computes_in_bf16() -> bool:
    """Whether the processor has bf16 arithmetic of its own; known on Linux alone."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@cache
def keep_freed_memory() -> None:
    """Let glibc keep the memory that arrays and tensors give back, where there is a glibc.

    By default every large one is a fresh mapping whose pages the kernel has to clear again. Kept, a step of the tiny
    backbone takes two thirds of the time, and results do not change. An ingest gains nothing and needs 14 % more.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # names of malloc.h
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its container if that has a limit.

    What files in memory take counts as free, because it is given up on demand.
    """
    free = int(psutil.virtual_memory().available)
    for limit_file, use_file, statistics_file, cached_name in CGROUP_FILES:
        try:
            limit, use = (int((CGROUP / name).read_text()) for name in (limit_file, use_file))
            lines = (CGROUP / statistics_file).read_text().splitlines()
            cached = next(int(line.split()[1]) for line in lines if line.split()[0] == cached_name)
        except (OSError, ValueError, StopIteration):  # none of this generation, or no limit
            continue
        free = min(free, limit - use + cached)
    return max(free, 0)
