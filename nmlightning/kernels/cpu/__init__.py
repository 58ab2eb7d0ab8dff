"""Kernels for the CPU, in C++, built by the first `nm fit` or by `nm kernels build`."""
