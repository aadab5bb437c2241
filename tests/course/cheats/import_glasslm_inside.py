# kind: library
import numpy as np


def silu(x):
    from glasslm import ops

    return ops.silu(np.asarray(x))
