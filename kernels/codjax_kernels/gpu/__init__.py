"""Passes on NVIDIA Hopper GPUs, written in Pallas for its Mosaic GPU back end.

Needs jax >= 0.12; `target.py` compiles them for an H100 where there is none.
"""
