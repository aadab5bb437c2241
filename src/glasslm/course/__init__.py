"""What courses ask for: the capstone."""
