"""A plan as data: what each rank of a host gets. All that a rank itself has to import. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import LaunchError


@dataclass(frozen=True)
class RankPlacement:
    """Where one rank runs. cpus are logical CPU numbers, nodes those they sit on."""

    rank: int  # local rank
    cpus: tuple[int, ...]
    cores: int
    threads: int
    nodes: tuple[int, ...]
    packages: tuple[int, ...]
    mem_policy: str  # bind, preferred, interleave, weighted_interleave or none
    mem_nodes: tuple[int, ...]
    gpu: int | None
    env: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The rank's part of the JSON of --dry-run."""
        return {
            "rank": self.rank,
            "cpus": list(self.cpus),
            "cores": self.cores,
            "threads": self.threads,
            "nodes": list(self.nodes),
            "packages": list(self.packages),
            "mem_policy": self.mem_policy,
            "mem_nodes": list(self.mem_nodes),
            "gpu": self.gpu,
            "env": dict(self.env),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RankPlacement:
        """The inverse of to_dict. Raises LaunchError for anything else."""
        try:
            lists = {
                name: tuple(int(n) for n in data[name]) for name in ("cpus", "nodes", "packages", "mem_nodes")
            }
            return cls(
                rank=int(data["rank"]),
                cores=int(data["cores"]),
                threads=int(data["threads"]),
                mem_policy=str(data["mem_policy"]),
                gpu=data["gpu"],
                env={str(k): str(v) for k, v in data["env"].items()},
                **lists,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LaunchError(
                f"a rank's placement cannot be read ({error!r}); start ranks with tp-launch"
            ) from None


@dataclass(frozen=True)
class Plan:
    """All ranks of a host, and what had to be done differently from what was asked."""

    ranks: tuple[RankPlacement, ...]
    warnings: tuple[str, ...]
