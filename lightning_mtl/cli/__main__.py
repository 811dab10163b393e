"""Runs the command line as ``python -m lightning_mtl.cli``, for torchrun."""

from lightning_mtl.cli import main

main()
