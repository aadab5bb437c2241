"""The model, described once: parameter table (parameters), LoRA (adapters), FLOPs (flops)."""
