"""Triton kernels for CUDA; without Triton, only `backend` of these can be imported."""
