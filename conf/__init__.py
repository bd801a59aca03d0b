"""Experiments and their parts, composed by Hydra (installed as `dyndet.conf`)."""
