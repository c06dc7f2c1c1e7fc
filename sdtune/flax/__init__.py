"""What training in JAX has in place of PyTorch's parts."""
