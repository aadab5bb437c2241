"""For teachers: hand out exercises to a class, grade what comes back, and show what looks odd."""
