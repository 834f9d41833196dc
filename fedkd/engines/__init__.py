"""How many clients run at once, and where: grids that carry a strategy's messages to clients."""
