"""Export to transformers, GGUF (llama.cpp) and PEFT, and import from transformers and PEFT."""
