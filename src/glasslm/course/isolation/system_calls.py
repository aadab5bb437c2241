"""System calls that a learner's function has no use for, refused by the kernel (Linux, seccomp).

The network, other programs, other processes, and every change of a file are refused for this
process, whoever runs it, also as root and inside a container. The filter cannot be taken off
again. See seccomp(2) and the kernel's Documentation/userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import sys

# Numbers of system calls: name -> (x86-64, aarch64); -1 where there is none.
# From the kernel's arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
REFUSED_CALLS = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "fork": (57, -1), "vfork": (58, -1), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "pidfd_send_signal": (424, 424), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "rename": (82, -1), "renameat": (264, 38),
    "renameat2": (316, 276), "mkdir": (83, -1), "mkdirat": (258, 34), "rmdir": (84, -1),
    "creat": (85, -1), "link": (86, -1), "linkat": (265, 37), "unlink": (87, -1),
    "unlinkat": (263, 35), "symlink": (88, -1), "symlinkat": (266, 36), "truncate": (76, 45),
    "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, -1), "fchown": (93, 55), "lchown": (94, -1), "fchownat": (260, 54),
    "mknod": (133, -1), "mknodat": (259, 33), "setxattr": (188, 5), "utimensat": (280, 88),
    "mount": (165, 40), "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280),
    "io_uring_setup": (425, 425), "keyctl": (250, 219), "shmget": (29, 194), "msgget": (68, 186),
    "openat2": (437, 437), "perf_event_open": (298, 241), "prlimit64": (302, 261),
}  # fmt: skip
CLONE = (56, 220)
CLONE3 = (435, 435)
OPEN = (2, -1)
OPENAT = (257, 56)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_CLONE_THREAD = 0x10000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 1, 38, 22, 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
# Instructions of classic BPF: load a word; jump if equal, if not below, if a bit is set; return.
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_X32 = 0x40000000  # the bit of x86's second set of numbers for the same calls


def end_with_parent() -> None:
    """Ask the kernel to kill this process when the one that started it ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def refuse_system_calls() -> bool:
    """Refuse network, programs, processes and changes of files from here on, for this process.

    Returns False where the system cannot do that: it is not Linux, or neither x86-64 nor aarch64.
    """
    if sys.platform != "linux" or os.uname().machine not in ARCHITECTURES or sys.maxsize < 2**32:
        return False
    program = b"".join(build_filter(*ARCHITECTURES[os.uname().machine]))
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    return libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.create_string_buffer(header), 0, 0) == 0


def build_filter(column: int, architecture: int) -> list[bytes]:
    """The filter as instructions of 8 bytes: code, jump if true, jump if false, operand.

    Args:
        column: Which of each pair of numbers is this machine's.
        architecture: The kernel's name of the machine (AUDIT_ARCH_*).
    """
    refuse = _instruction(_RETURN, _ERRNO | errno.EPERM)
    program = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_IF_EQUAL, architecture, 1, 0),
        refuse,
        _instruction(_LOAD, _NUMBER),
        _instruction(_IF_AT_LEAST, _X32, 0, 1),
        refuse,
    ]
    for numbers in REFUSED_CALLS.values():
        if numbers[column] >= 0:
            program += [_instruction(_IF_EQUAL, numbers[column], 0, 1), refuse]
    # The C library falls back to clone, whose flags are a number and not behind a pointer.
    unknown = _instruction(_RETURN, _ERRNO | errno.ENOSYS)
    program += [_instruction(_IF_EQUAL, CLONE3[column], 0, 1), unknown]
    program += _refuse_by_argument(CLONE[column], 0, _CLONE_THREAD, is_refused_if_set=False)
    program += _refuse_by_argument(OPENAT[column], 2, _WRITING, is_refused_if_set=True)
    if OPEN[column] >= 0:
        program += _refuse_by_argument(OPEN[column], 1, _WRITING, is_refused_if_set=True)
    return [*program, _instruction(_RETURN, _ALLOW)]


def _refuse_by_argument(
    number: int, argument: int, bits: int, *, is_refused_if_set: bool
) -> list[bytes]:
    """Instructions: refuse one call where any of `bits` is set in an argument, or where none is."""
    jumps = (0, 1) if is_refused_if_set else (1, 0)
    return [
        _instruction(_IF_EQUAL, number, 0, 4),
        _instruction(_LOAD, _ARGUMENTS + 8 * argument),
        _instruction(_IF_ANY_BIT, bits, *jumps),
        _instruction(_RETURN, _ERRNO | errno.EPERM),
        _instruction(_LOAD, _NUMBER),
    ]


def _instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, operand)
