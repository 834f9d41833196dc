"""K models of one architecture, trained and tested side by side."""
