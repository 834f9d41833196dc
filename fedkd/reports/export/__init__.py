"""Exports of trained models: the program, its file formats, latencies and the card."""
