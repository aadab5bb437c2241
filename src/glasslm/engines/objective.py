"""The training objective: the cross-entropy and the auxiliary loss terms with their coefficients.

Both engines report each term under its name, without its coefficient, and differentiate the sum
that `objective` computes.
"""

from __future__ import annotations

from glasslm.config.schema import RunConfig
from glasslm.engines.protocol import Losses


def coefficients(config: RunConfig) -> dict[str, float]:
    """The coefficient of each auxiliary term of a run, by its name.

    smoothing: the mean nats of all symbols minus those of the target; z: log² of softmax's
    denominator. Both are means over the targets. balance and router_z: see moe.Routing; means over
    the sequences and the layers. A mixture of experts reports its two terms even at coefficient 0.
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
    """The number that training minimizes: the cross-entropy plus the weighted auxiliary terms."""
    terms = coefficients(config)
    return losses.cross_entropy + sum(
        terms[name] * value for name, value in losses.auxiliary.items()
    )
