"""Where the memory of weights and caches lies when the process interleaves its own over nodes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tp_runtime.kernels.cpu import build
from tp_runtime.launch import mempolicy

CHILD = """
import sys, torch
from tp_runtime.kernels.attention import empty_cache
from tp_runtime.kernels.cpu import build
from tp_runtime.launch import mempolicy
build.load()
mempolicy.set_policy(sys.argv[1], [0])
SIZE = 4 << 20

def policy_of(tensor):
    start, policy = tensor.fill_(1).data_ptr(), None
    for line in open("/proc/self/numa_maps"):
        words = line.split()
        if int(words[0], 16) > start:
            break
        policy = words[1]
    return policy

weight, cache = torch.ops.tp_cpu.empty_weight(SIZE), empty_cache((SIZE,), torch.uint8, "cpu")
small = torch.ops.tp_cpu.empty_weight(100)
print(policy_of(weight), policy_of(small), policy_of(cache))
"""


@pytest.mark.parametrize("policy", ["interleave", "bind"])
def test_weights_lie_where_they_are_touched(policy: str) -> None:
    """Not over all nodes, where the process interleaves; a cache does. A binding is the user's, and holds."""
    build.load()
    try:
        mempolicy.get_policy()
    except OSError as error:
        pytest.skip(f"this host tells no memory policy: {error}")
    done = subprocess.run([sys.executable, "-c", CHILD, policy], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    weight, small, cache = done.stdout.split()
    if policy == "interleave":
        assert weight == small == "local" and cache == "interleave:0"
    else:
        assert weight == small == cache == "bind:0"
