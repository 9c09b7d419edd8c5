"""The C++ kernels for CPUs: src/ (C++), build.py (built on first use), ops.py (what torch.compile sees)."""
