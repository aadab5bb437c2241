"""Experiments and checks: gradient checks, diagnosis, verification, studies, scaling laws, statistics."""
