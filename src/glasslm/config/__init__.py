"""The configuration of a run: frozen dataclasses (schema), their conversion, and presets."""
