"""Preference tuning: DPO on pairs of answers, and GRPO on a reward that a program computes."""
