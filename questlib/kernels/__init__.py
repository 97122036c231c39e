"""Kernels in C++ for the CPU, compiled on the user's machine when they are first needed."""
