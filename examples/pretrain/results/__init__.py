"""What runs have written, read, and drawn."""
