"""From a loaded model to tokens: the step, the cache, sampling, and the ranks that run them.

source.py and kv_blocks.py import no torch; nothing is imported here, so that they stay light.
"""
