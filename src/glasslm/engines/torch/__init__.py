"""The PyTorch engine: the same model with autograd, on CPUs, GPUs and several processes."""
