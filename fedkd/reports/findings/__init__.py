"""What kept a run from converging, and a key to change."""
