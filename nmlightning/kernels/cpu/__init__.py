"""Kernels for the CPU, in C++, which one command builds: `nm kernels build`."""
