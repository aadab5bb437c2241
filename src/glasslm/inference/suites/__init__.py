"""Suites: what a trained model can do beyond a low loss, each measured beside a baseline."""
