"""What an export is made of: the program, the forms of its file, latencies, the card."""
