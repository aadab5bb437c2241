"""Read the tables and logs of any program: rows of named cells, numbers, and known columns."""
