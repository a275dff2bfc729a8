"""Scores of samples and reconstructions, and the command that writes them."""
