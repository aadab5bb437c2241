"""Exercises: write an operation by hand, and learn what is wrong with it.

>>> import glasslm
>>> import numpy as np
>>> def silu(x):
...     s = 1 / (1 + np.exp(-x))
...     return x * s, lambda dy: dy * (s + s * (1 - s))
>>> verdict = glasslm.learn.check(silu)
>>> verdict.forward, verdict.backward, verdict.verdict
('right', 'wrong', 'factor')
>>> verdict.sentence
'x is left out in dx, in the term dy x s (1 - s)'
"""

from glasslm.course.learn.checking import check, check_file, check_function
from glasslm.course.learn.verdict import Verdict

__all__ = ["Verdict", "check", "check_file", "check_function"]
