"""Which machine this is, as far as a comparison of speeds has to know."""

import os
import platform
import re
import socket
from pathlib import Path


def machine() -> dict[str, str | int]:
    """Its name, the processor's, how many cores this process may use, and the system."""
    return {
        "host": socket.gethostname(),
        "processor": _processor(),
        "cores": num_cores(),
        "system": platform.platform(),
    }


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.M) if information.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
