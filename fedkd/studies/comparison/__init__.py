"""Methods compared on the same data: the runs, their numbers, how sure differences are, tables."""
