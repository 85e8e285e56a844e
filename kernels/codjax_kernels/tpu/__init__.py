"""Pallas kernels for TPUs: `logprobs`, `attention`, and the block shapes tuned for each chip."""
