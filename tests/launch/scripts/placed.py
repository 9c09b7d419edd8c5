"""Each rank writes what it finds itself placed as to FOLDER/RANK.json: placed.py FOLDER [all-reduce] [hold]."""

import json
import os
import sys
import time
from pathlib import Path

assert "torch" not in sys.modules, "torch before the placement"

from tp_runtime.launch import affinity, mempolicy  # noqa: E402

facts = {
    "cpus": sorted(os.sched_getaffinity(0)),
    "in_maps": affinity.policy_in_force(),
    "by_call": mempolicy.get_policy(),
    "environ": {
        k: v
        for k, v in os.environ.items()
        if k.startswith(("TP_", "OMP_", "MASTER_", "GLOO_")) or "RANK" in k
    },
    "words": sys.argv[1:],
}
if "all-reduce" in sys.argv:
    import torch
    import torch.distributed as dist

    from tp_runtime import collectives
    from tp_runtime.mesh import init_mesh

    init_mesh()
    total = torch.ones(1)
    dist.all_reduce(total)
    host = int(os.environ["RANK"]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])] if dist.get_world_size() == 4 else []
    facts |= {
        "sum": int(total),
        "whole_job": collectives.attach(dist.group.WORLD),
        "sum_over_all": int(collectives.all_reduce(torch.ones(1), dist.group.WORLD)),
        "this_host": collectives.attach(halves[host]) if halves else None,
        "sum_here": int(collectives.all_reduce(torch.ones(1), halves[host])) if halves else None,
        "threads": torch.get_num_threads(),
        "cpus_after": sorted(os.sched_getaffinity(0)),
    }
    dist.destroy_process_group()
(Path(sys.argv[1]) / f"{os.environ['RANK']}.json").write_text(json.dumps(facts))
if "hold" in sys.argv:
    memory = bytearray(os.urandom(1 << 20)) * 64
    time.sleep(1.5)
