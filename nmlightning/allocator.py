"""Keeps freed memory in the process, where glibc would give it back to the system after each step.

A network's activations are freed in every step. glibc unmaps what is large, cuts off the end of its
heap, and the next step faults each page in again, zeroed: a tenth of a step on a CPU.
"""

import ctypes
import os
import re

_MMAP_THRESHOLD = 1 << 30  # the most that mallopt's int and glibc's alignment allow
# Of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_NEVER = -1  # as a threshold, which has no sign


def unsupported_reason() -> str:
    """Return why freed memory is given back as this system has it; nothing if it can be kept."""
    try:
        glibc = ctypes.CDLL("libc.so.6")
        _ = glibc.gnu_get_libc_version
    except (OSError, AttributeError):
        return "there is no glibc"
    malloc, glibcs = (
        ctypes.cast(library.malloc, ctypes.c_void_p).value for library in (ctypes.CDLL(None), glibc)
    )
    if malloc != glibcs:
        return "another allocator than glibc's is loaded"
    given = [*(name for name in os.environ if name.startswith("MALLOC_"))]
    given += re.findall(r"glibc\.malloc\.\w+", os.environ.get("GLIBC_TUNABLES", ""))
    ours = [name for name in given if re.search("mmap|trim|top_pad", name.lower())]
    return f"{ours[0]} is set" if ours else ""


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for what is allocated next, in all of this process.

    What is larger than 1 GiB is given back, and everything is where `MALLOC_` variables or
    `GLIBC_TUNABLES` say how, or the allocator is another. The memory at the peak is the same.

    Returns:
        True if it is kept from now on.

    Examples:
        >>> kept = keep_freed_memory()  # before a training loop of your own
    """
    if unsupported_reason():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # glibc before 2.35 takes no threshold above 32 MiB.
    sized = mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD) or mallopt(_M_MMAP_MAX, 0)
    return bool(sized and mallopt(_M_TRIM_THRESHOLD, _NEVER))
