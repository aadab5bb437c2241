"""Gradient checks: hand-written gradients against finite differences and against autograd."""
