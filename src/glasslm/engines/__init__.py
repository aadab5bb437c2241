"""The seam: `protocol.Engine` is what an engine does, `factory.make_engine` makes one; numpy/ and torch/ implement it."""
