"""Exchange with other programs: transformers, GGUF (llama.cpp) and PEFT, each in both directions where possible."""
