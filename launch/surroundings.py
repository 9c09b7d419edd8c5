"""What this host adds to a user's options: other jobs, CUDA_VISIBLE_DEVICES, libraries to preload.

tp-launch and ranks that place themselves (srun, mpirun) ask here, so that both plan alike. No torch.
"""

from __future__ import annotations

import re
from dataclasses import replace

from .. import env
from . import neighbours
from . import preload as preloads
from .placement import Options
from .topology import HostTopology


def with_surroundings(topology: HostTopology, options: Options, preload: bool = True) -> Options:
    """`options` with what is found on this host, whose topology this is."""
    others = neighbours.find(topology.allowed_cpus)
    visible, note = visible_gpus()
    return replace(
        options,
        busy_cpus=others.cpus,
        unbound_ranks=len(others.unbound_pids),
        visible_gpus=visible,
        gpu_note=note,
        preload=preloads.find() if preload else preloads.Preload(),
        already_preloaded=env.get("LD_PRELOAD"),
    )


def visible_gpus() -> tuple[tuple[int, ...] | None, str | None]:
    """CUDA_VISIBLE_DEVICES as numbers in PCI order (None: not set), and what cannot be known of it.

    As CUDA reads it: nothing follows an invalid entry, so that "" and "-1" are no GPU.
    """
    text = env.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None, None
    numbers: list[int] = []
    for word in (word.strip() for word in text.split(",")):
        if re.match(r"(GPU|MIG)-", word):
            return (), (
                f"CUDA_VISIBLE_DEVICES={text} names GPUs by UUID: ranks were placed without regard to GPUs; "
                "give their numbers in PCI order"
            )
        if not word.isdecimal():
            break
        numbers.append(int(word))
    return tuple(numbers), None
