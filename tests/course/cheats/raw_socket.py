# kind: network
import _socket as s


def silu(x):
    s.socket(s.AF_INET, s.SOCK_STREAM).connect(("127.0.0.1", 9))
    return x, lambda dy: dy
