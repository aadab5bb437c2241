"""Training: `launch.train` and `launch.resume` prepare a run, `loop.Loop` makes the steps."""
