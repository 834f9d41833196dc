"""Clients: how they execute an instruction, what they send, and what they keep between rounds."""
