"""A learner's functions in a process of their own: limited, watched, and called over a pipe."""
