"""Diagnosis: what is wrong with a model, a run or a loss curve, and what to do."""
