"""Run one federation: check it, choose an engine, run it or resume it."""
