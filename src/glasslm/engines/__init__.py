"""The seam: protocol.Engine declares it, numpy/ and torch/ implement it, factory.py chooses."""
