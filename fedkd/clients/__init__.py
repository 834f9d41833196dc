"""What a client does with an instruction, what it sends, and what it keeps between rounds."""
