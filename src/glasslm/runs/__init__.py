"""The run folder: `run_folder.Run` reads it; run.json (record), metrics.jsonl (metrics, history), checkpoints."""
