"""Kernels of codjax."""
