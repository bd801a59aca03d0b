"""Executions of the sparse operations, without autograd: the same functions in plain torch and in Triton."""
