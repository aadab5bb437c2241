"""What a run is: frozen dataclasses (schema), conversion from flags and JSON (conversion), presets."""
