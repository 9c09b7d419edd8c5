"""The operations a decode step spends its time in, as ops torch.compile can trace.

linear.py: weight-only linears. attention.py: the paged cache. fused.py: norm, rotary embedding, SwiGLU.
reference.py: the slow twin of each. cpu/: the C++ behind them. Importing this package loads torch.
"""
