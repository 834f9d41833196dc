"""The server: its round loop, its messages, what it checks and what it remembers."""
