"""The stage `retrain`: train a pruned model on what the dense model generates."""

from __future__ import annotations

from ecodiff.retrain.train import retrain

__all__ = ["retrain"]
