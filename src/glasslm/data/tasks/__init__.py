"""Synthetic tasks: texts whose lines are a question, "=", and the one right answer."""
