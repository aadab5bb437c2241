"""The seam and its two sides: choice.py chooses the engine, factory.py makes it.

protocol.Engine declares what an engine can do; numpy/ and torch/ implement it.
"""
