"""Checkpoints: reading them, what they may build, starting from them."""
