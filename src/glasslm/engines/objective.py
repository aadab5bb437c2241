"""What is minimised beside the cross-entropy: the terms that a run's switches turn on, and their coefficients.

Both engines report each term under its name, without its coefficient, and differentiate the sum that `objective` tells.
"""

from __future__ import annotations

from glasslm.config.schema import RunConfig
from glasslm.engines.protocol import Losses


def coefficients(config: RunConfig) -> dict[str, float]:
    """What each term is multiplied by. Those of a mixture of experts are told even where they do not count.

    smoothing: the mean nats of all symbols, less those of the target; z: log² of softmax's sum. Both are means over
    the targets. balance and router_z: moe.Routing says what they are; means over the sequences and the layers.
    """
    c, terms = config.optimizer, {}
    if c.label_smoothing:
        terms["smoothing"] = c.label_smoothing
    if c.z_loss:
        terms["z"] = c.z_loss
    if config.model.n_experts:
        terms |= {"balance": c.balance_loss, "router_z": c.router_z_loss}
    return terms


def objective(losses: Losses, config: RunConfig) -> float:
    """What the gradients are of."""
    terms = coefficients(config)
    return losses.cross_entropy + sum(
        terms[name] * value for name, value in losses.auxiliary.items()
    )
