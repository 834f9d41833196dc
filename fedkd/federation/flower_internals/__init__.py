"""All uses of Flower's private modules: an in-process grid, error replies, the simulation backend."""
