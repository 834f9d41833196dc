"""Figures from plain numbers, drawn by matplotlib, as in papers on federated distillation."""
