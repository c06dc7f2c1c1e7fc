"""The parts from which the training scripts in `examples/` are built, and the `sdtune` command."""
