"""Triton kernels for NVIDIA GPUs, each with a plain PyTorch twin in kernels/reference.py or its test.

gemv.py: linears of 1 to 16 rows at memory speed. pack.py: weights as they want them. dequant.py: weights
back to bf16, for many rows. linear.py: the ops. attention.py: rotary positions, the cache, attention over
its blocks; attention_ops.py launches it. tokens.py: from an id to its vector, from logits to candidates.
read_ceiling.py: what the memory gives. Importing one of them imports triton, so callers do it only where
tensors are on a GPU.
"""
