"""Choosing α, τ and the like by cross-validation on training data, never on the test set."""
