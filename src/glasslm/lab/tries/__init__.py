"""glasslm try: is a change better? Paired seeds, a sequential test, and one ledger of all tries."""
