"""What a comparison is made of: the runs, their numbers, how sure differences are, tables, sentences."""
