"""Studies of many runs: the sweep, ablations, scaling ladders, adapter studies."""
