"""Short runnable scripts, each about one question; start them from the project's folder."""
