"""Experiments and checks.

Gradient checks, diagnosis, verification, studies, scaling laws, statistics.
"""
