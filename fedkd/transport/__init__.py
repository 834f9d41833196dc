"""Reaching clients: a grid in this process, and Flower's simulation with its failures mended."""
