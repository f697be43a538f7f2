"""The rate of this host's time stamp counter.

Under TCG the guest reads the host's counter, and what the guest takes for its rate is frozen into
every snapshot. No file tells the rate dependably: `cpu MHz` follows frequency scaling, the kernel
log rolls over, and perf's clock page is empty on a virtual host. So it is measured, against the
clock that no NTP daemon steers.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import time
from collections.abc import Callable

from sandmartin.errors import ToolFailed

#: rdtsc; shl rdx, 32; or rax, rdx; ret
_RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")
_WINDOW_S = 0.1
_TRIES = 50


def measure_tsc_khz() -> int:
    """The rate in kHz, to about one part in a million. Takes a tenth of a second.

    Raises ToolFailed where it cannot be read.
    """
    if platform.machine() != "x86_64":
        raise ToolFailed(f"this host is {platform.machine()}; VMs need x86_64")
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError as error:
        raise ToolFailed(
            f"the time stamp counter cannot be read: {error.strerror}",
            hint="a security policy forbids executable anonymous memory to the agent",
        ) from error
    page.write(_RDTSC)
    anchor = ctypes.c_char.from_buffer(page)
    rdtsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor))
    try:
        first_ns, first = _reading(rdtsc)
        time.sleep(_WINDOW_S)
        second_ns, second = _reading(rdtsc)
    finally:
        # mmap cannot be unmapped while the ctypes view of it lives.
        del anchor
        page.close()
    return round((second - first) * 1_000_000 / (second_ns - first_ns))


def _reading(rdtsc: Callable[[], int]) -> tuple[float, int]:
    """Nanoseconds and counter at one moment: of many readings the one least interrupted."""
    best = (float("inf"), 0.0, 0)
    for _ in range(_TRIES):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        counter = rdtsc()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        best = min(best, (after - before, (before + after) / 2, counter))
    return best[1], best[2]
