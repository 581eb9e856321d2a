"""The losses: for each its formula, its function and its module, side by side."""

from .alrp import ALRPLoss, ALRPLossOutput, alrp_loss

__all__ = ["ALRPLoss", "ALRPLossOutput", "alrp_loss"]
