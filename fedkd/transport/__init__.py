"""All that fedkd needs of Flower 1.41 and that Flower does not call public."""
