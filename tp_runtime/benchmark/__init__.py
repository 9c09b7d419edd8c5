"""What tp-bench measures: kernels, collectives, decoding, scaling over ranks, and the peers.

definitions.py: every figure's meaning. options.py: the command line, without torch. launching.py: starting
ranks. card.py: what a measurement was taken on. read.py: the read ceiling. cuda.py, collectives_cuda.py,
kernels_cuda.py: the same on GPUs. kept.py: what a command finds of its earlier runs. The others are a command
each; predict.py is the analytic model that scaling lays its points over.
"""
