"""One training step, rehearsed: the real model classes and the real objective on tensors without memory.

No formula here knows an architecture. What is assumed instead:

- Lengths are the worst that a run can meet: every prompt has the length asked about, every answer `max_new_tokens`.
- Attention runs in a fused kernel that keeps no scores, as torch's does on GPUs and CPUs alike. A model that
  transformers runs with `eager` attention (Gemma 2, say) is rehearsed so.
- Kernels need no memory of their own, and an allocator loses none (on a CPU, glibc's may hold back half as much again
  unless MALLOC_MMAP_THRESHOLD_ is set: `scripts/bench_plan.py`); a GPU's context (about 0.5 GiB) is not counted, nor
  what a sleeping server keeps of it (its context, and graphs where it has captured some).
- Packing is planned as padding: the tokens are as many.
- What servers do is left out, since they have devices of their own (`served` names it). One that shares this device
  takes what it may while it writes, and writes all answers of a round side by side.
- Quantised weights take their bits and their scales, and the whole weight of a layer while it runs; what else the
  kernels of bitsandbytes need, and the time to unpack, is not counted.
"""

import gc
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lsm_lightning.batching import TokenBatch, hidden_states
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.module import OnPolicyDistillation
from lsm_lightning.objectives import Positions, head
from lsm_lightning.objectives.head import GATHER_ELEMENTS, GATHER_ELEMENTS_GPU, OutputHead
from lsm_lightning.optimizers import MakeOptimizer, make_optimizer
from lsm_lightning.planning.quantised import quantise
from lsm_lightning.planning.watch import Watch
from lsm_lightning.pretrained import DType, check_model, locate
from lsm_lightning.rollout import Engine, LocalEngine, Sampling, VLLMEngine
from lsm_lightning.rollout.batch import more_columns
from lsm_lightning.rollout.cache import RowCache, RowLayer
from lsm_lightning.rollout.sampling import sample
from lsm_lightning.sharding import decoder_layers
from lsm_lightning.teacher import LocalTeacher, ServedTeacher, Teacher
from lsm_lightning.teacher.scoring import LOGITS_AT_ONCE
from lsm_lightning.top_k import top_k
from lsm_lightning.types import Support
from lsm_lightning.update import WATCHED_POSITIONS

# An attention without a mask function: transformers then makes no mask and leaves causality to the kernel. With fake
# tensors it would always make one, since it cannot see that nothing is masked.
UNMASKED = "sdpa_without_mask"
AttentionInterface.register(UNMASKED, sdpa_attention_forward)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """What one process does in one step of a task."""

    prompt: int
    """Tokens of a prompt."""
    new: int
    """Tokens of an answer."""
    episodes: int
    """On this process."""
    samples: int
    """Episodes that share a prompt in their first turn."""
    turns: int
    """Of an episode."""
    test_episodes: int
    """That this process plays at once when teachers are evaluated; 0 where they are not."""

    @property
    def sequence(self) -> int:
        """Tokens of prompt and answer."""
        return self.prompt + self.new

    def rows(self, tokens: int) -> int:
        """How many sequences go through a model together where so many tokens are allowed."""
        return min(max(1, tokens // self.sequence), self.episodes * self.turns)

    def batches(self, tokens: int) -> int:
        """How many times."""
        return math.ceil(self.episodes * self.turns / self.rows(tokens))


STUDENT = ("student weights", "gradients", "optimiser state")
SPREAD = (*STUDENT, "optimiser's temporaries")
"""What FSDP2 spreads over processes."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the trainer's settings make of a process."""

    processes: int = 1
    shards: int = 1
    """Over so many processes FSDP2 spreads the student's weights, gradients and optimiser state."""
    offloaded: bool = False
    """Whether those lie in main memory, not on the device."""
    precision: str = "32-true"
    gpu: bool = False

    @property
    def compute(self) -> torch.dtype | None:
        """The type that autocast computes in."""
        return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision)

    @property
    def whole_type(self) -> torch.dtype | None:
        """The type that the whole student is converted to."""
        return {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}.get(self.precision)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What one part of a step takes on one device."""

    name: str
    bytes: dict[str, int]
    """By kind, at the moment of the peak."""
    flops: dict[str, float] = field(default_factory=dict)
    """Of a whole step, by kind of work."""
    read: float = 0.0
    """Bytes of weights and KV cache that decoding reads in a whole step."""
    offloaded: int = 0
    """Bytes of the student that rest in main memory meanwhile."""
    moved: float = 0.0
    """Bytes of it that go to the device or come back in a whole step."""

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.bytes.values())


@dataclass(kw_only=True)
class Rehearsal:
    """A step's phases in order, and what else a plan tells about it."""

    phases: list[Phase] = field(default_factory=list)
    parameters: int = 0
    """Of the student."""
    quantised: int = 0
    """Of these, kept in 4 or 8 bits."""
    logits_never_made: int = 0
    """Bytes of a micro-batch's float32 logits over the vocabulary and of their gradient."""
    host: int = 0
    """Bytes in the machine's memory while a process loads, since weights go through it on their way to a GPU, or later
    where the student lies there."""


def rehearse(
    module: OnPolicyDistillation, lengths: Lengths, machine: Machine, *, task: str, memory: float
) -> Rehearsal:
    """Go through one step of a task.

    Args:
        module: As the command line builds it; nothing is loaded.
        lengths: Of what it would do.
        machine: On what.
        task: Whose teacher scores. All teachers are in memory.
        memory: Bytes of the device, of which a server that shares it takes its part.

    Raises:
        ConfigurationError: A model's configuration cannot be read, an engine or teacher is of an unknown kind, or a
            server's part of the memory does not hold its weights.
    """
    if module.quantization is not None and machine.shards > 1:
        raise ConfigurationError("model.quantization: quantised weights cannot be sharded; use the strategy ddp.")
    asked: list[Engine | Teacher] = [module.engine, *module.teachers.values()]
    known = (LocalEngine, LocalTeacher, VLLMEngine, ServedTeacher)
    if others := [type(one).__name__ for one in asked if not isinstance(one, known)]:
        raise ConfigurationError(
            f"A plan knows this package's engines and teachers, not {others[0]}: put a local one in its place, and "
            "leave out of the plan what it takes."
        )
    watch = Watch()
    with watch.pretend():
        step = _Step(module, lengths, machine, watch)
        step.evaluate(task)
        step.first_optimiser_step()
        step.rollout(memory)
        step.score(task)
        step.update()
    return step.result


def served(module: OnPolicyDistillation) -> list[str]:
    """What is done by servers elsewhere, and is no part of a plan."""
    elsewhere = isinstance(module.engine, VLLMEngine) and not module.engine.servers.colocated
    return ["rollouts"] * elsewhere + [
        f"the {name} teacher" for name, teacher in module.teachers.items() if isinstance(teacher, ServedTeacher)
    ]


def optimizer_of(module: OnPolicyDistillation, machine: Machine) -> MakeOptimizer:
    """Makes the module's optimizer as it would be on the machine, for tensors that lie on a CPU."""

    def make(parameters: Iterable[Any]) -> torch.optim.Optimizer:
        optimizer = module.optimizer_of(parameters)
        for group in optimizer.param_groups if machine.gpu and not machine.offloaded else ():
            if "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = True  # what torch chooses there
            if group.get("capturable"):
                group["capturable"] = False  # refused on a CPU, and changes where the step counter lies
        return optimizer

    return make


class _Step:
    """The state of a rehearsal: models, optimizer, and what was found so far."""

    def __init__(self, module: OnPolicyDistillation, lengths: Lengths, machine: Machine, watch: Watch) -> None:
        self.module, self.lengths, self.machine, self.watch = module, lengths, machine, watch
        self.optimizer: torch.optim.Optimizer
        own = self.own_type = machine.whole_type or _type(module.student_name, module.dtype_name)
        with watch.label("student weights"):
            # FSDP2 gathers and computes in the compute type; the shards keep their own.
            dtype = machine.compute or own if self._sharded else own
            # peft moves fresh adapters to where they are; fake tensors cannot even stay in a module that is moved.
            with patch.object(nn.Module, "to", lambda moved, *_, **__: moved):
                student = _model(module.student_name, dtype).train()
                quantised = 0 if module.quantization is None else quantise(student, module.quantization)
                module.prepared(student)
        watch.weights(student)
        self.student = student
        self.trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self.share = own.itemsize / dtype.itemsize / machine.shards
        """Bytes of this process for each byte of the student as it is rehearsed."""
        self.gathered = _gathered(student) if self._sharded else 0
        self.buckets = self._gradient_bytes if machine.processes > 1 and not self._sharded else 0
        """DDP lays gradients out once more, to send them."""
        self.teachers: dict[str, PreTrainedModel] = {}
        self.teacher_bytes: dict[str, int] = {}
        host = watch.live["student weights"] * own.itemsize // dtype.itemsize
        unpacked = sum(p.numel() for p in self.student.parameters() if p.is_floating_point())
        self.result = Rehearsal(parameters=unpacked + quantised, quantised=quantised, host=host)
        for name, teacher in module.teachers.items():
            if not isinstance(teacher, LocalTeacher):
                continue
            before = watch.live["teachers' weights"]
            with watch.label("teachers' weights"):
                self.teachers[name] = (
                    _model(teacher.path, _type(teacher.path, teacher.dtype)).requires_grad_(False).eval()
                )
            self.teacher_bytes[name] = watch.live["teachers' weights"] - before
            self.result.host = max(self.result.host, host + self.teacher_bytes[name])
        extra = 0 if module.objective.teacher_tokens is None else module.objective.student_tokens
        extra += module.objective.adds_sampled
        vocabulary: int = OutputHead.of(self.student).weight.shape[0]
        tokens = module.objective.teacher_tokens
        self.members = (vocabulary if tokens is None else tokens) + extra
        watch.restart()
        self._note("load")

    # ---- phases -----------------------------------------------------------------------------------------------------

    def evaluate(self, task: str) -> None:
        """The teacher plays the test split, before the first step."""
        teacher = self.module.teachers[task]
        if not isinstance(teacher, LocalTeacher):
            return
        self.watch.restart()
        if rows := min(teacher.batch_size, self.lengths.test_episodes):
            waiting = self.lengths.test_episodes > rows
            self._write(self.teachers[task], rows, rows, self.module.eval_sampling, waiting=waiting)
            self._note("evaluation", task=task)

    def first_optimiser_step(self) -> None:
        """Makes the optimizer's state, which is there in every later step."""
        self._make_gradients()
        make = optimizer_of(self.module, self.machine)
        self.optimizer = make_optimizer(make, self.student, self.module.no_decay)
        with self.watch.label("optimiser state"):
            self.optimizer.step()
        self.optimizer.zero_grad()

    def rollout(self, memory: float) -> None:
        """The first prompts, and the last token of answers that are as long as can be.

        Args:
            memory: Bytes of the device.
        """
        engine, lengths = self.module.engine, self.lengths
        server: dict[str, int] = {}
        if isinstance(engine, LocalEngine):
            rows = min(engine.batch_size, lengths.episodes)
        elif isinstance(engine, VLLMEngine) and engine.servers.colocated:
            rows, server = lengths.episodes, self._of_server(engine, memory)
        else:
            return
        self.watch.restart()
        without = self.watch.at_peak
        with self.watch.label("rollout replica"):
            dtype = self._replica_type(engine.dtype)
            self.replica = _model(self.module.student_name, dtype).requires_grad_(False).eval()
        distinct = math.ceil(rows / lengths.samples)
        waiting = lengths.episodes > rows or lengths.turns > 1
        prefill, decode, read = self._write(self.replica, rows, distinct, self.module.sampling, waiting=waiting)
        rounds = math.ceil(lengths.episodes / rows) * lengths.turns
        # Sharded weights come into the replica one at a time.
        largest = max(p.nbytes for p in self.student.parameters()) if self._sharded else 0
        more = {"gathered units": largest}
        if server:  # of the rehearsal only the work counts
            del self.replica
            gc.collect()
            self.watch.at_peak, more = without, server
        self._note(
            "rollout",
            flops={"prefill": prefill * rounds, "decode": decode * rounds},
            read=read * rounds,
            more=more,
        )

    def _of_server(self, engine: VLLMEngine, memory: float) -> dict[str, int]:
        """Bytes by kind of a server that is awake: it takes all that it may, whatever it writes."""
        launch = engine.servers.launch
        assert launch is not None
        part = round(launch.memory_share * memory)
        weights = self.result.parameters * self._replica_type(engine.dtype).itemsize
        if part <= weights:
            raise ConfigurationError(
                f"servers.launch.command: --gpu-memory-utilization={launch.memory_share:g} is {part / 2**30:.2f} GiB, "
                f"and the student's weights alone are {weights / 2**30:.2f} GiB: raise it."
            )
        return {"vLLM server's weights": weights, "vLLM server's cache": part - weights}

    def _replica_type(self, dtype: DType) -> torch.dtype:
        """Of an engine's weights."""
        chosen: torch.dtype = self.own_type if dtype == "auto" else getattr(torch, dtype)
        return chosen

    def score(self, task: str) -> None:
        """The task's teacher reads what was written."""
        teacher, lengths = self.module.teachers[task], self.lengths
        if not isinstance(teacher, LocalTeacher):
            return
        model = self.teachers[task]
        self.watch.restart()
        with torch.no_grad(), self.watch.label("teacher's activations"):
            hidden = hidden_states(model, self._batch(lengths.rows(teacher.batch_tokens)))
            with self.watch.label("teacher's logits"):
                of_body, of_teacher = self.watch.flops, OutputHead.of(model)
                part = hidden[: max(1, LOGITS_AT_ONCE // of_teacher.weight.shape[0])].clone()
                _top_tokens(of_teacher, part, self.module.objective.teacher_tokens, merged=self.module.mask == "repair")
            flops = of_body + (self.watch.flops - of_body) * len(hidden) / len(part)
        more = {}
        if teacher.sharded and self.machine.processes > 1:  # two layers, and what belongs to none
            layers = _layers(model)
            more = {"gathered units": 2 * max(layers) + self.teacher_bytes[task] - sum(layers)}
        work = {"teacher": flops * lengths.batches(teacher.batch_tokens)}
        self._note("teacher", task=task, flops=work, more=more)

    def update(self) -> None:
        """A micro-batch, beside the gradients of an earlier one where there are several; then the optimiser."""
        lengths, tokens = self.lengths, self.module.micro_batch_tokens
        rows, batches = lengths.rows(tokens), lengths.batches(tokens)
        if batches > 1 and not self._sharded:
            self._make_gradients()
        handles = [p.register_post_accumulate_grad_hook(self._gradient) for p in self.trained]
        self.watch.restart()
        forward, backward = self._micro_batch(rows, first=batches == 1)
        for handle in handles:
            handle.remove()
        work: dict[str, float] = {"forward": forward * batches, "backward": backward * batches}
        if self.module.objective.student_tokens:
            work["student's support"] = forward * batches
        more = {"gathered units": self.gathered, "DDP's buckets": self.buckets}
        moved = 0.0
        if self._sharded:
            self.watch.at_peak["gradients"] = self._gradient_bytes
        if self.machine.offloaded:  # weights for each pass, gradients on their way back
            weights = (3 if self.module.objective.student_tokens else 2) * self.watch.live["student weights"]
            moved = self.share * (weights + self._gradient_bytes) * batches
        self._note("update", flops=work, more=more, moved=moved)
        self._optimiser_step()
        vocabulary = OutputHead.of(self.student).weight.shape[0]
        self.result.logits_never_made = 2 * 4 * rows * lengths.new * vocabulary

    def _optimiser_step(self) -> None:
        self._make_gradients()
        self.watch.restart()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.module.gradient_clip)
        with self.watch.label("optimiser's temporaries"):
            self.optimizer.step()
        self._note("optimiser", more={"DDP's buckets": self.buckets})

    # ---- their parts ------------------------------------------------------------------------------------------------

    @property
    def _sharded(self) -> bool:
        return self.machine.shards > 1

    @property
    def _gradient_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.trained)

    def _note(
        self,
        name: str,
        *,
        task: str | None = None,
        flops: dict[str, float] | None = None,
        read: float = 0.0,
        more: dict[str, int] | None = None,
        moved: float = 0.0,
    ) -> None:
        """Write a phase down, with what is spread over processes divided among them; `task` is whose teacher works."""
        found = Counter(self.watch.at_peak)
        offloaded = 0
        for kind in SPREAD:
            size = round(self.share * found[kind])
            found[kind] = 0 if self.machine.offloaded else size
            offloaded += size - found[kind]
        self.result.host = max(self.result.host, offloaded)
        found["teachers' weights"] = sum(self._resident(teacher, name, task) for teacher in self.teachers)
        found.update(more or {})
        kept = {kind: size for kind, size in found.most_common() if size > 0}
        self.result.phases.append(
            Phase(name=name, bytes=kept, flops=flops or {}, read=read, offloaded=offloaded, moved=moved)
        )

    def _resident(self, teacher: str, phase: str, task: str | None) -> int:
        """Bytes of a teacher's weights on this device; while it writes answers it is whole."""
        settings = self.module.teachers[teacher]
        assert isinstance(settings, LocalTeacher)
        if settings.offload and teacher != task:
            return 0
        whole = not settings.sharded or (teacher == task and phase == "evaluation")
        return self.teacher_bytes[teacher] // (1 if whole else self.machine.processes)

    @torch.no_grad()
    def _write(
        self, model: PreTrainedModel, rows: int, distinct: int, sampling: Sampling, *, waiting: bool
    ) -> tuple[float, float, float]:
        """Prefill and the last step of decoding; FLOPs of both and bytes read for one batch of whole answers.

        Args:
            model: That writes.
            rows: Answers side by side.
            distinct: Their prompts.
            sampling: How tokens are drawn.
            waiting: Whether more answers take the places of these.
        """
        watch, lengths = self.watch, self.lengths
        implementation = model.config._attn_implementation
        if implementation == UNMASKED:
            model.set_attn_implementation("sdpa")  # prompts of many lengths are masked
        prefilled, index = self._prefilled(model, distinct, lengths.prompt), torch.zeros(rows, dtype=torch.long)
        length, needed = lengths.prompt, max(1, lengths.new - 1)
        with watch.label("KV cache"):
            cache = RowCache(model, length, rows, more_columns(length, needed))
            cache.append(prefilled, index)
            peaks = [(watch.peak, watch.at_peak)]
            prefill = watch.flops
            # The largest cache does not come about as it is made here, so the peak starts over.
            while (columns := more_columns(length, needed)) < needed:
                length, needed = length + columns, needed - columns
            grows = waiting or length > lengths.prompt
            del cache
            cache = RowCache(model, length, rows, 0 if grows else needed)
            cache.append(prefilled, index)
            del prefilled
            watch.restart()
            if grows:
                cache.reserve(rows, more_columns(length, lengths.new) if waiting else needed)
        self._skip(cache, needed - 1)
        of_cache = watch.live["KV cache"]
        peaks.append((watch.peak, watch.at_peak))
        watch.restart()
        logits = self._forward(model, cache, rows, 1, lengths.sequence)
        with watch.label("decoding logits"):
            sample(logits, torch.empty(rows), sampling)
        decode = watch.flops
        watch.peak, watch.at_peak = max((*peaks, (watch.peak, watch.at_peak)), key=lambda peak: peak[0])
        model.set_attn_implementation(implementation)
        layer: Any = model.get_output_embeddings()
        embedding: Any = model.get_input_embeddings()
        read: float = sum(parameter.nbytes for parameter in model.parameters())
        if embedding.weight is not layer.weight:
            read -= embedding.weight.nbytes  # of which one row a token is read
        read += of_cache * (lengths.prompt + lengths.new / 2) / lengths.sequence
        return prefill, decode * lengths.new, read * lengths.new

    def _prefilled(self, model: PreTrainedModel, rows: int, width: int) -> "_Cache":
        cache = _Cache(self.watch, config=model.config)
        self._forward(model, cache, rows, width, width)
        return cache

    def _skip(self, cache: RowCache, tokens: int) -> None:
        """As if so many had been written."""
        for layer in cache.layers:
            if isinstance(layer, RowLayer):
                layer.length, layer.end = layer.length + tokens, layer.end + tokens

    def _forward(self, model: PreTrainedModel, cache: Cache, rows: int, width: int, seen: int) -> Tensor:
        """Float32 logits of the last position, as `LocalEngine` asks for them; the mask covers what was seen."""
        layer: Any = model.get_output_embeddings()
        hook = layer.register_forward_pre_hook(lambda *_: setattr(self.watch, "kind", "decoding logits"))
        with self.watch.label("rollout's activations"):
            ids, positions = torch.zeros((2, rows, width), dtype=torch.long)
            output = model(
                input_ids=ids, attention_mask=torch.ones((rows, seen), dtype=torch.long), position_ids=positions,
                cache=cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            hook.remove()
            return output.logits[:, -1].float()

    def _micro_batch(self, rows: int, *, first: bool) -> tuple[int, int]:
        """As `accumulate_gradients` runs it, its variables as long alive; FLOPs forward and backward."""
        watch, chunk = self.watch, GATHER_ELEMENTS_GPU if self.machine.gpu else GATHER_ELEMENTS
        with _autocast(self.machine.compute):
            with watch.label("activations"):
                earlier = None if first else torch.empty((rows * self.lengths.new, self.student.config.hidden_size))
                hidden = hidden_states(self.student, self._batch(rows))
                positions = self._positions(hidden)
                del hidden
            del earlier  # the last micro-batch's positions
            with watch.label("head's buffers"), patch.object(head, "GATHER_ELEMENTS", chunk):
                with _autocast(None):
                    loss = self.module.objective(OutputHead.of(self.student), positions)
                summed = (loss.value * torch.empty(len(loss.value))).sum()
                forward = watch.flops
                with watch.label("backward's temporaries"):
                    summed.backward()
        return forward, watch.flops - forward

    def _batch(self, rows: int) -> TokenBatch:
        new, sequence = self.lengths.new, self.lengths.sequence
        row = torch.zeros(rows * new, dtype=torch.long)
        ids = torch.zeros((rows, sequence), dtype=torch.long)
        return TokenBatch(ids=ids, position_ids=None, sequence=row, row=row, column=row, targets=row)

    def _positions(self, hidden: Tensor) -> Positions:
        n, step = len(hidden), self.lengths.episodes * self.lengths.turns * self.lengths.new
        numbers, ids = torch.empty(n), torch.zeros(n, dtype=torch.long)
        kept, watched = torch.empty((2, n), dtype=torch.bool)
        support = Support(
            ids=torch.zeros((n, self.members), dtype=torch.long),
            log_probs=torch.empty((n, self.members)),
            sampled=numbers, turn_end=numbers, lost=numbers, comparable=kept, alike=kept,
        )  # fmt: skip
        return Positions(
            hidden=hidden[kept], sampled=ids, sampler_log_probs=numbers, turn=ids, support=support,
            watched=self.watch.counts(watched, -(-n // max(1, step // WATCHED_POSITIONS))),
        )  # fmt: skip

    def _make_gradients(self) -> None:
        with self.watch.label("gradients"):
            for parameter in self.trained:
                parameter.grad = torch.empty_like(parameter)

    def _gradient(self, parameter: Tensor) -> None:
        """Tell a gradient from other tensors of the backward pass; FSDP2 spreads it and frees the whole one."""
        assert parameter.grad is not None
        if self._sharded:
            parameter.grad = None
        else:
            self.watch.relabel(parameter.grad, "gradients")


class _Cache(DynamicCache):
    """A cache whose tensors are counted as such."""

    def __init__(self, watch: Watch, **options: Any) -> None:
        super().__init__(**options)
        self._watch = watch

    def update(self, *arguments: Any, **options: Any) -> Any:
        """See `DynamicCache.update`."""
        with self._watch.label("KV cache"):
            return super().update(*arguments, **options)


def _model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model class that `load_model` would load, without weights."""
    config = AutoConfig.from_pretrained(locate(name))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(UNMASKED)
    return model


def _type(name: str, dtype: DType) -> torch.dtype:
    """The type that `load_model` would load weights in."""
    check_model(name)
    if dtype != "auto":
        return getattr(torch, dtype)
    saved = AutoConfig.from_pretrained(locate(name)).dtype
    return saved if isinstance(saved, torch.dtype) else torch.float32


def _top_tokens(head: OutputHead, hidden: Tensor, k: int | None, *, merged: bool) -> None:
    """What `LocalTeacher` does with a chunk of hidden states, as far as it takes memory.

    Args:
        head: The teacher's.
        hidden: Of the chunk.
        k: Its top tokens that are asked for; None: all.
        merged: Whether the ends of a turn are scored as one token.
    """
    log_probs = head.all_logits(hidden).log_softmax(-1)
    if merged:
        end = torch.zeros(1, dtype=torch.long)
        log_probs = log_probs.index_fill(-1, end, -torch.inf).index_copy_(-1, end, log_probs[:, :1])
    log_probs.add_(torch.empty(log_probs.shape[1]))
    top_k(log_probs, k or log_probs.shape[1])


def _gathered(student: PreTrainedModel) -> int:
    """Bytes that FSDP2 holds at once besides a process's own part.

    Two layers (the one that computes and the one fetched meanwhile), the gradient of one, and that again in float32 on
    its way to the processes; and all the while what belongs to no layer: the root unit stays gathered from forward to
    backward pass, and the matrix of the K-row head is gathered for it.
    """
    layers = _layers(student)
    sent = max(sum(4 * p.numel() for p in layer.parameters()) for layer in decoder_layers(student))
    return 3 * max(layers) + sent + sum(p.nbytes for p in student.parameters()) - sum(layers)


def _layers(model: PreTrainedModel) -> list[int]:
    """Bytes of each layer's weights."""
    return [sum(p.nbytes for p in layer.parameters()) for layer in decoder_layers(model)]


def _autocast(dtype: torch.dtype | None) -> torch.autocast:
    # On fake CPU tensors, whatever the device: what is cast differs little.
    return torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)
