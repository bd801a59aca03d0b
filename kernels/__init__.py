"""Triton kernels of masked sparse convolution (installed as `dyndet.kernels`); none ship yet."""
