"""Verification: integrity of a run, exact resume, reproduction, comparison of runs."""
