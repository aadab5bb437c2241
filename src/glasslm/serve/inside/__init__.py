"""The data of the microscope page: what a served model computes on a text, over HTTP."""
