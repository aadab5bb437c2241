"""The model described once: the parameter table (parameters), LoRA adapters (adapters), FLOPs (flops)."""
