"""The limits of the container that this process is in, as Linux's control groups have them (v1 and v2).

limit_cores()      # 2.0: so many may work at once
measure_room()     # bytes of memory that it may still take

Both are infinite without a limit, and on other systems.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")  # lines such as 0::/path (v2) or 4:memory:/path (v1)
MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),  # v2
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # v1
)


def limit_cores() -> float:
    """Cores whose time the container may use."""
    limits = [math.inf]
    for folder in find_groups("cpu"):
        with suppress(OSError, ValueError):  # no such file, or no limit
            quota, period = map(int, (folder / "cpu.max").read_text().split())
            limits.append(quota / period)
        with suppress(OSError, ValueError):
            quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            limits.append(quota / period if quota > 0 else math.inf)
    return min(limits)


def measure_room() -> float:
    """Bytes that the container may still take; pages of files that the kernel gives back count as free."""
    rooms = [math.inf]
    for folder in find_groups("memory"):
        for limit, used, given_back in MEMORY:
            with suppress(OSError, ValueError):
                most, now = (int((folder / name).read_text()) for name in (limit, used))
                counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                rooms.append(max(0, most - now + int(counts.get(given_back, 0))))
    return min(rooms)


def find_groups(controller: str) -> Iterator[Path]:
    """The folders of this process's group and of those around it, whose limits hold too.

    Within a container the outermost folder is often that of the container, and its own path is not to be seen.
    """
    with suppress(OSError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                group = PurePosixPath(path.lstrip("/"))
                yield from (GROUPS / (controller if controllers else "") / part for part in (group, *group.parents))
