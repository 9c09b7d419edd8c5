"""Speculative decoding: a cheap draft proposes tokens, the target checks several of them in one pass.

kind.py       what --draft asks for, and what can be refused before ranks exist (no torch)
interface.py  what a draft is to the engine; another kind is one file that implements Drafter
lookup.py     n-grams of prompt and answer; no model
model.py      another model, or the target at fewer bits, with a cache of its own
skip.py       some of the target's own layers, on its weights and its cache
verify.py     which tokens of a draft stand: exact rejection sampling
forced.py     acceptance by decree, for benchmarks at random weights
adaptive.py   how many tokens to draft, from acceptance and costs as they are seen
report.py     what speculation brought and what it cost
speculator.py holds them together for LLM

Importing this package loads no torch.
"""
