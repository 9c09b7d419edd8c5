"""Triton kernels for NVIDIA GPUs, each with a plain PyTorch twin in reference.py.

gemv.py: linears of 1 to 16 rows at memory speed. pack.py: weights as they want them. linear.py: the ops.
attention.py: rotary positions, the cache, attention over its blocks. reduce.py: sums over splits and ranks,
residual, norm. sampling.py: the likeliest token over ranks. read_ceiling.py: what the memory gives.
Importing one of them imports triton, so callers do it only where tensors are on a GPU.
"""
