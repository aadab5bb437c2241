# kind: checker
from traceback import StackSummary as Summary
from traceback import walk_stack as walk


def silu(x):
    lines = Summary.extract(walk(None))
    return x * len(lines), lambda dy: dy
