"""This process as the operating system sees it: how long it has run, the memory it holds, the cores it may use."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

IMPORTED = time.monotonic()


def age_seconds() -> float:
    """Seconds since the process was created; since this module's import where there is no /proc."""
    try:
        # The second field may hold spaces and brackets, so count from behind it; the start time is field 22, in ticks.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.monotonic() - IMPORTED


def resident_bytes() -> int:
    """Resident memory now; its highest value so far where there is no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def cores() -> int:
    """Cores that this process may use: those it is bound to, and no more than its container's CPU limit."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return bound
    return bound if quota == "max" else max(1, min(bound, int(quota) // int(period)))


def memory_bytes() -> int:
    """Of this machine, or of what its container may take."""
    here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return here
    return here if limit == "max" else min(here, int(limit))
