"""Figures from plain numbers, drawn by matplotlib: what papers about federated distillation show."""
