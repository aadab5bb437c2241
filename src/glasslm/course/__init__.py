"""What courses need: exercises (`learn`), grading (`grading`, `isolation`) and the capstone."""
