"""The hand-written engine: every operation with its backward pass, in NumPy."""
