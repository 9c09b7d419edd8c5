"""LLM: load a model over the ranks of this job and answer prompts. The engine's Python face.

Every rank makes the same calls. Rank 0 drives: it decides which tokens run, samples, stops, and sends
each step's small descriptor; the other ranks follow until it sends the result. No other rank decides a
stop, a length or a seed, so ranks cannot drift apart.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import env
from .. import mesh as meshes
from ..collectives import attach
from ..config import EngineConfig, SamplingParams
from ..errors import CollectiveError, ConfigError, RequestError
from ..text import Tokenizer
from ..text.byte_tokenizer import ByteTokenizer
from . import sampling
from .batch import Batch
from .build import build_runner, usable_device
from .burst import decode_burst, pack_burst, unpack_burst
from .ceiling import job_read_ceiling_gb_s
from .channel import Channel, Operation, from_words, to_words
from .device_memory import device_memory_errors
from .figures import Timing
from .kv_blocks import BlockPool
from .requests import Prompt, prompt_items, token_ids, with_params
from .sequence import Completion
from .sequence import Sequence as Answer
from .source import resolve
from .speculative.build import build_speculator
from .speculative.interface import NOTHING, Done
from .speculative.verify import decide
from .step import Row, Step
from .tokenizing import NoText, has_tokenizer, open_tokenizer

DECODE_TIMEOUT_S = 60.0

OnText = Callable[[int, str], bool | None]


class LLM:
    """A model ready to answer, over all ranks of this job.

    model: a name from configs/models, a directory in Hugging Face layout, a GGUF file or a hub id; None:
    the demo model where installed. settings: the other fields of EngineConfig. measure_ceiling: find out,
    before loading, what the ranks' memory can deliver (read_ceiling_gb_s; kept per host). Raises
    ConfigError, ModelNotFoundError, CheckpointError, TokenizerError, ShardingError or MemoryLimitError.
    """

    def __init__(
        self, model: str | os.PathLike[str] | None = None, *, measure_ceiling: bool = False, **settings: Any
    ) -> None:
        unknown = [name for name in settings if name not in EngineConfig.field_names()]
        if unknown:
            raise ConfigError(
                f"LLM has no setting {unknown[0]!r}; it has {', '.join(EngineConfig.field_names())}"
            )
        self.config = EngineConfig(model=model, **settings)  # type: ignore[arg-type]
        self._closed = self._broken = False
        self.source = resolve(
            self.config.model,
            weights=self.config.weights,
            random_weights=self.config.random_weights,
            layers=self.config.layers,
        )
        device = usable_device(self.config)
        self.mesh = meshes.init_mesh(device=device, timeout_s=self.config.load_timeout_s)
        group = meshes.tp_group(self.mesh)
        attach(group, self.config.load_timeout_s, transport=self.config.collectives)
        self.rank, self.world_size = meshes.tp_rank(self.mesh), meshes.tp_size(self.mesh)
        self.read_ceiling_gb_s = job_read_ceiling_gb_s(self.mesh, device) if measure_ceiling else None
        with device_memory_errors(self.world_size):
            self._make_ready(device)
        limit_s = (
            self.config.collective_timeout_s or env.get_seconds("TP_COLLECTIVE_TIMEOUT") or DECODE_TIMEOUT_S
        )
        self._channel = Channel(
            self.runner.group, limit_s=limit_s, patience_s=max(limit_s, self.config.load_timeout_s)
        )

    def _make_ready(self, device: str) -> None:
        self.built = build_runner(self.source, self.config, self.mesh, device)
        self.runner = self.built.runner
        self.pool = BlockPool(self.runner.cache.num_blocks, self.runner.cache.shape.block_size)
        self.speculator = build_speculator(self.config, self.source, self.built, self.mesh, self._announced)
        self.timing: Timing | None = None
        self._tokenizer: Tokenizer | ByteTokenizer | None = None
        self.runner.warm_up()
        if self.speculator is not None:
            self.speculator.warm_up(self.runner)

    @property
    def tokenizer(self) -> Tokenizer | ByteTokenizer:
        """The model's tokenizer. Raises TokenizerError where there is none."""
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(self.source)
        return self._tokenizer

    @property
    def context(self) -> int:
        """Most tokens, prompt and answer together, that a sequence may hold."""
        return self.built.context

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a text, of chat messages ({"role", "content"}), or ids as they are.

        Raises RequestError for an empty prompt, one that leaves no room in the context, or unknown ids.
        """
        if isinstance(prompt, str):
            found: list[Any] = self.tokenizer.encode(prompt) if prompt else []
        else:
            found = prompt_items(prompt)
            if found and isinstance(found[0], Mapping):
                found = self.tokenizer.encode_chat(found)
        if not found:
            raise RequestError("the prompt is empty; give at least one token of text")
        ids = token_ids(found, self.built.model_config.vocab_size)
        if len(ids) >= self.context:
            limit = self.built.model_config.max_position_embeddings
            raise RequestError(
                f"the prompt has {len(ids)} tokens and the context holds {self.context}, answer included; "
                f"shorten it or raise --context (this model's limit is {limit})"
            )
        if self.speculator is not None:
            self.speculator.check_prompt(len(ids))
        return ids

    def generate(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """Answer every prompt; the completions in the prompts' order, the same on every rank.

        Ranks may come to a call at different times, up to load_timeout_s apart.
        params: one for all, or one a prompt. on_text(index, piece): called on rank 0 as text becomes
        certain; False from it ends that answer ("cancelled"); while it runs the others wait.
        Raises RequestError before anything runs, CollectiveError where a rank is lost.
        """
        requests = with_params(prompts, params)
        if self._closed:
            raise RequestError("this LLM is closed; make another one")
        if self._broken:
            raise RequestError(
                "an error ended an earlier call, and ranks may be at different places in it; make another LLM"
            )
        answers = [self._answer(prompt, its) for prompt, its in requests]
        self._channel.begin()
        try:
            if self.rank != 0:
                return self._follow()
            self._drive(answers, on_text)
        except BaseException:
            self._broken = self.world_size > 1
            if self.rank == 0:
                self._channel.end()  # no sign of life from here on: the others must not wait for a result
            raise
        completions = [answer.completion() for answer in answers]
        shared = json.dumps([asdict(completion) for completion in completions])
        self._channel.end(Operation.RESULT, to_words(shared))
        return completions

    def from_rank_0(self, value: Any) -> Any:
        """Rank 0's value (any that pickles), on every rank; what the others bring is dropped."""
        found = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(
                found, group=self.runner.group, group_src=0, device=torch.device("cpu")
            )
        return found[0]

    def close(self) -> None:
        """Let the other ranks go. Idempotent."""
        self._closed = True
        self._channel.close(silently=self._broken)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def _answer(self, prompt: Prompt, params: SamplingParams) -> Answer:
        ids = self.encode(prompt)
        room = min(params.max_new_tokens, self.context - len(ids))
        params = SamplingParams(**{**asdict(params), "max_new_tokens": room})
        if not has_tokenizer(self.source):
            return Answer(ids, params, self.built.eos_ids, NoText())
        return Answer(ids, params, self.built.eos_ids | self.tokenizer.eos_ids, self.tokenizer.stream())

    def _drive(self, answers: list[Answer], on_text: OnText | None) -> None:
        """Rank 0: run steps until every answer is finished. However that ends, no row keeps anything."""
        batch = Batch(self.pool, max_rows=self.runner.max_rows, max_tokens=self.runner.max_tokens)
        for answer in answers:
            batch.add(answer)
        try:
            self._steps(batch, answers, on_text)
        finally:
            batch.clear()
            for answer in answers:
                if self.speculator is not None:
                    self.speculator.release(answer)

    def _steps(self, batch: Batch, answers: list[Answer], on_text: OnText | None) -> None:
        """Rank 0: the steps of a batch, which holds the answers."""
        index = {id(answer): i for i, answer in enumerate(answers)}
        speculator = self.speculator
        if speculator is not None:
            speculator.begin()
        start = first = time.perf_counter()
        untimed = 0  # tokens that rows drew while others still had none

        def tell(answer: Answer, piece: str) -> None:
            wanted = on_text(index[id(answer)], piece) if piece and on_text is not None else None
            if wanted is False and answer.finish_reason is None:
                answer.finish_reason = "cancelled"

        while batch.busy:
            batch.admit()
            if speculator is not None:
                speculator.propose(batch.running)
            rows = batch.next_rows()
            if speculator is None and decode_burst(self.runner, self._channel, rows, tell):
                batch.retire()
                continue
            any_first = False
            for answer, logits_NV in self._run(rows):
                any_first |= not answer.output
                tell(answer, self._accept(answer, logits_NV))
            if any_first:
                first, untimed = time.perf_counter(), sum(len(answer.output) for answer in answers)
            if speculator is not None:
                speculator.end_pass(rows)
            for answer in batch.retire():
                if speculator is not None:
                    speculator.release(answer)
        decoded = sum(len(answer.output) for answer in answers) - untimed
        self.timing = Timing(first - start, time.perf_counter() - first, decoded)

    def _run(self, rows: Sequence[tuple[Answer, tuple[int, ...]]]) -> list[tuple[Answer, Tensor]]:
        """One step on all ranks; each sequence that reached its last known token, with its logits [N, V]: one
        row behind that token, and one behind each token of its draft."""
        described = []
        for answer, tokens in rows:
            wanted = max(0, answer.num_cached + len(tokens) - answer.num_tokens + 1)
            described.append(Row(tokens, answer.num_cached, tuple(answer.blocks), wanted))
        step = Step(tuple(described))
        if self.speculator is not None:
            self.speculator.begin_step()
        with self._channel.announced(Operation.STEP, step.pack()):
            logits_LV = self.runner.execute(step)
        if self.speculator is not None:
            self.speculator.end_step()
        for answer, tokens in rows:
            answer.num_cached += len(tokens)
        ready = [answer for (answer, _), row in zip(rows, described, strict=True) if row.num_logits]
        return list(
            zip(ready, logits_LV.split([r.num_logits for r in described if r.num_logits]), strict=True)
        )

    def _announced(self, step: Step, execute: Callable[[Step], Done], steps: int = 0) -> Done:
        """Run a step of the draft on all ranks, or start a burst of `steps`; see speculative/interface.py."""
        with self._channel.announced(Operation.DRAFT, pack_burst(step, steps)):
            return execute(step)

    def _accept(self, answer: Answer, logits_NV: Tensor) -> str:
        """Draw the next tokens of a sequence; the text that became certain."""
        if self.speculator is None:
            tokens = decide(logits_NV, NOTHING, answer.params, answer.prompt, answer.output)
        else:
            tokens = self.speculator.decide(answer, logits_NV)
        text = ""
        for token, logits_V in zip(tokens, logits_NV, strict=False):
            if answer.params.logprobs is not None:
                answer.logprobs.append(sampling.logprobs(logits_V, token, answer.params.logprobs))
            text += answer.accept(token)
            if answer.finish_reason is not None:
                break
        answer.draft = ()
        answer.num_cached = answer.num_tokens - 1  # what fell is void: the next tokens are written over it
        return text

    def _follow(self) -> list[Completion]:
        """Other ranks: run the steps rank 0 sends until it sends the result."""
        while True:
            operation, words = self._channel.receive()
            if operation is Operation.STEP:
                self.runner.execute(Step.unpack(words))
            elif operation is Operation.DRAFT:
                assert self.speculator is not None, "a draft step without a draft"
                self.speculator.drafter.follow(*unpack_burst(words))
            elif operation is Operation.BURST:
                self.runner.start_burst(*unpack_burst(words))
            elif operation is Operation.RESULT:
                return [_completion(fields) for fields in json.loads(from_words(words))]
            else:
                raise CollectiveError("rank 0 left while this rank waited for a result; see its own message")


def _completion(fields: dict[str, Any]) -> Completion:
    """A completion from the JSON that rank 0 sent."""
    fields["tokens"] = tuple(fields["tokens"])
    if fields["logprobs"] is not None:
        entries = fields["logprobs"]
        fields["logprobs"] = tuple(
            sampling.TokenLogprobs(e["token"], e["logprob"], tuple((t, p) for t, p in e["top"]))
            for e in entries
        )
    return Completion(**fields)
