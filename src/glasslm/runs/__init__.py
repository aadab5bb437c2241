"""The run folder: its lock, run.json (record), metrics.jsonl (metrics, history) and checkpoints."""
