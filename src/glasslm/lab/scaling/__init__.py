"""Scaling laws: fits, their uncertainty and the plans that follow, from any table of runs."""
