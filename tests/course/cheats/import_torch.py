# kind: library
import torch


def silu(x):
    t = torch.tensor(x, requires_grad=True)
    y = torch.nn.functional.silu(t)
    return y.detach().numpy(), lambda dy: torch.autograd.grad(y, t, torch.tensor(dy))[0].numpy()
