"""What a model computes on one text, measured: pure functions, which the microscope page shows."""
