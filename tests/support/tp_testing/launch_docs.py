"""The drawings in docs/launch.md, made by the tool itself: `python -m tp_testing.launch_docs` renews them.

Each stands in a code block below a comment `<!-- plan: HOST, nproc N -->`.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from tp_runtime.launch import display
from tp_runtime.launch.placement import plan_ranks
from tp_runtime.launch.topology import read_topology

from . import sysfs_writer, trees

PAGE = Path(__file__).parents[3] / "docs" / "launch.md"
HOSTS = {
    "1 socket": sysfs_writer.Host(cores_of_nodes=(16,), smt=2),
    "2 sockets": sysfs_writer.Host(packages=2, cores_of_nodes=(32,), smt=2),
    "8 GPUs": sysfs_writer.EIGHT_GPUS,
}
REAL = {"2 sockets SNC2": "memorysidecaches"}
_BLOCK = re.compile(r"(<!-- plan: ([^\n]+), nproc (\d+) -->\n```text\n)(.*?)(```\n)", re.DOTALL)


def render(text: str) -> str:
    """The page with every plan in it made anew."""

    def renew(found: re.Match[str]) -> str:
        with tempfile.TemporaryDirectory() as folder:
            host = found[2]
            root = (
                trees.extract(REAL[host], Path(folder))
                if host in REAL
                else sysfs_writer.write(HOSTS[host], Path(folder))
            )
            topology = read_topology(root)
            return found[1] + display.plan_text(topology, plan_ranks(topology, int(found[3]))) + found[5]

    return _BLOCK.sub(renew, text)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
    sys.stdout.write(f"renewed {len(_BLOCK.findall(PAGE.read_text()))} plans in {PAGE}\n")
