# kind: memory
import ctypes


def silu(x):
    ctypes.CDLL(None).getpid()
    return x, lambda dy: dy
