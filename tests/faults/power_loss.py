"""Copies a folder as a power loss would leave it: what the kernel has not written to the disk yet is gone.

Usage: power_loss.py FROM TO. Whoever writes must stand still meanwhile. The kernel tells which pages of a file are
dirty (cachestat(2), Linux 6.5): each becomes zeros, and a file ends before its dirty tail. Directory entries and
sizes count as written. Prints `<dirty pages> <files with some>`. Exit status 3: this kernel cannot tell.
"""

import ctypes
import os
import shutil
import sys

CACHESTAT = 451
PAGE = os.sysconf("SC_PAGE_SIZE")
libc = ctypes.CDLL(None, use_errno=True)


class Range(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class Stat(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("cache", "dirty", "writeback", "evicted", "recently_evicted")]


def unwritten(file, offset, length):
    stat = Stat()
    if libc.syscall(CACHESTAT, file, ctypes.byref(Range(offset, length)), ctypes.byref(stat), 0) != 0:
        sys.exit(3)
    return stat.dirty + stat.writeback


def dirty_pages(path):
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0 or unwritten(file.fileno(), 0, 0) == 0:
            return [], size
        return [at for at in range(0, size, PAGE) if unwritten(file.fileno(), at, PAGE)], size


def lose(path, dirty, size):
    with open(path, "r+b") as file:
        end = size
        while dirty and end - 1 < dirty[-1] + PAGE:
            end = dirty.pop()
        file.truncate(end)
        for at in dirty:
            file.seek(at)
            file.write(bytes(min(PAGE, end - at)))


def flush(root):
    """What was copied is on the disk: the next power loss must not take it."""
    for folder, _, names in os.walk(root):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())


def main(source, target):
    # First look, then copy: reading does not make a page dirty.
    found = {}
    for folder, _, names in os.walk(source):
        for name in names:
            path = os.path.join(folder, name)
            dirty, size = dirty_pages(path)
            if dirty:
                found[os.path.relpath(path, source)] = (dirty, size)
    shutil.copytree(source, target)
    print(sum(len(dirty) for dirty, _ in found.values()), len(found))
    for path, (dirty, size) in found.items():
        lose(os.path.join(target, path), dirty, size)
    flush(target)


main(sys.argv[1], sys.argv[2])
