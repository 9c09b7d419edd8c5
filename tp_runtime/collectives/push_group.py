"""The buffers that ranks of one host push into, and launching the kernels of push.py on them.

Memory is torch's symmetric memory: every rank maps every other's buffer. Ranks whose GPUs cannot reach each
other have none, and use NCCL.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
from torch import Tensor

from ..dependent_launch import launch
from ..errors import CollectiveError
from ..log import once
from .push import all_reduce_kernel

_BLOCK = 256  # words of one program: one a thread, so that none waits twice


class PushGroup:
    """One rank's end of a group that sums by pushing. All ranks make it together.

    max_words: most 32-bit words of one reduction. timeout_s: how long one may wait for a peer. At world 1
    nothing is allocated. `op` arguments below number the reductions since the last `advance`, from 0 on.
    """

    def __init__(self, group: dist.ProcessGroup, device: str, *, max_words: int, timeout_s: float) -> None:
        self.rank, self.world_size = group.rank(), group.size()
        self.max_words = max_words
        self.limit_ns = int(timeout_s * 1e9)
        self.epoch = torch.zeros(1, dtype=torch.int32, device=device)
        self.status = torch.zeros(1, dtype=torch.int32, device=device)
        self.buffers = torch.zeros(1, dtype=torch.int64, device=device)
        if self.world_size > 1:
            self._map(group, device)

    def _map(self, group: dist.ProcessGroup, device: str) -> None:
        import torch.distributed._symmetric_memory as symmetric

        words = 2 * self.world_size * self.max_words
        self._memory = symmetric.empty(
            words, dtype=torch.int64, device=torch.device(device, torch.cuda.current_device())
        )
        self._memory.zero_()
        torch.cuda.synchronize()
        self._handle = symmetric.rendezvous(self._memory, group.group_name)
        peers = [self._handle.get_buffer(peer, (words,), torch.int64) for peer in range(self.world_size)]
        self.buffers = torch.tensor([each.data_ptr() for each in peers], dtype=torch.int64, device=device)
        dist.barrier(group)  # nobody pushes into a buffer that is still being cleared
        torch.cuda.synchronize()

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        """What every kernel takes: buffers, epoch, status."""
        return self.buffers, self.epoch, self.status

    @property
    def constants(self) -> dict[str, int]:
        """The kernels' constants."""
        return {"RANK": self.rank, "WORLD": self.world_size, "WORDS": self.max_words}

    def all_reduce(self, x: Tensor, out: Tensor, *, op: int = 0) -> None:
        """out = the sum over ranks of x: bf16 (an even number of them) or fp32, contiguous.

        The caller counts: after the reductions 0 .. n-1 comes advance(n).
        """
        assert x.is_contiguous() and out.is_contiguous() and x.dtype == out.dtype, (x.dtype, out.dtype)
        words, sums = x.view(-1).view(torch.int32), out.view(-1).view(torch.int32)
        assert len(words) <= self.max_words, f"{len(words)} words are beyond {self.max_words}"
        launch(
            all_reduce_kernel,
            (triton.cdiv(len(words), _BLOCK),),
            words,
            sums,
            *self.arguments,
            op,
            self.limit_ns,
            len(words),
            IS_BF16=x.dtype == torch.bfloat16,
            BC=_BLOCK,
            num_warps=_BLOCK // 32,
            **self.constants,
        )

    def advance(self, ops: int) -> None:
        """The next reductions are numbered from 0 again, after `ops` of them."""
        self.epoch += ops

    def check(self) -> None:
        """Raise CollectiveError where a reduction waited in vain. Waits for the GPU."""
        if int(self.status):
            raise CollectiveError(
                f"rank {self.rank} waited {self.limit_ns / 1e9:g} s for a peer inside a GPU reduction; it "
                "died or hangs: see its own message"
            )


def connect(group: dist.ProcessGroup, device: str, *, max_words: int, timeout_s: float) -> PushGroup | None:
    """A PushGroup where the ranks' GPUs reach each other's memory, else None. All ranks call it together."""
    trouble, made = "", None
    try:
        made = PushGroup(group, device, max_words=max_words, timeout_s=timeout_s)
    except RuntimeError as error:
        trouble = str(error).splitlines()[0]
    if group.size() > 1:
        answer = torch.tensor([int(made is not None)], device=device)
        dist.all_reduce(answer, op=dist.ReduceOp.MIN, group=group)
        if not int(answer):
            once(f"sums go through NCCL, and decoding is slower: no memory is shared among GPUs ({trouble})")
            return None
    return made
