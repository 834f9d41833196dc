"""Findings: why a run did not converge, and a key to change."""
