"""A plan counts what a step takes, without loading anything; on the CPU it is held against the step itself."""

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from peft import LoraConfig
from tiny import save_tiny
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast, Qwen2Config

from lsm_lightning.datamodule import AlternatingTasks
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.module import OnPolicyDistillation
from lsm_lightning.objectives import FullVocabulary, LocalSupportMatching, SampledToken
from lsm_lightning.planning import Plan, plan
from lsm_lightning.planning.plan import GIB, USABLE, machine_of
from lsm_lightning.planning.step import Phase
from lsm_lightning.planning.watch import Watch
from lsm_lightning.pretrained import load_model
from lsm_lightning.rollout import LocalEngine, VLLMEngine
from lsm_lightning.serving import Launch, Servers
from lsm_lightning.sharding import OffloadedModelParallelStrategy
from lsm_lightning.tasks.base import Episode, Task
from lsm_lightning.tasks.math import AdditionProblems, MathEpisode
from lsm_lightning.teacher import LocalTeacher

ROOT = Path(__file__).parent.parent
QWEN = {"num_hidden_layers": 28, "max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": 0}
QWEN_7B = {
    "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944,
    "vocab_size": 152064, "tie_word_embeddings": False, **QWEN,
}  # fmt: skip
QWEN_1_5B = {
    "hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960,
    "vocab_size": 151936, "tie_word_embeddings": True, **QWEN,
}  # fmt: skip
HUB = {
    "Qwen/Qwen2.5-7B-Instruct": (QWEN_7B, 7_615_616_512),
    "open-thoughts/OpenThinker3-7B": (QWEN_7B, 7_615_616_512),
    "langfeng01/GiGPO-Qwen2.5-7B-Instruct-ALFWorld": (QWEN_7B, 7_615_616_512),
    "Qwen/Qwen2.5-1.5B-Instruct": (QWEN_1_5B, 1_543_714_304),
}
"""Shapes, and the parameters that the models are published with."""
VOCABULARY, WIDTH = 340, 64
"""Of the small model that most tests plan."""
LARGE = ("paper_8gpu", "single_gpu_80gb")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Configurations of hub models without a network; of fewer layers where a number is given."""

    def make(layers: int | None = None) -> None:
        def from_pretrained(name: str, **_: Any) -> Qwen2Config:
            changes = {} if layers is None else {"num_hidden_layers": layers}
            return Qwen2Config(**{**HUB[name][0], **changes})

        monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)

    return make


@pytest.fixture(scope="module")
def folder(student_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of which only the configuration is left."""
    path = save_tiny(
        tmp_path_factory.mktemp("plan"), student_tokenizer, hidden_size=WIDTH, intermediate_size=160,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    (path / "model.safetensors").unlink()
    return path


@pytest.fixture
def wide_folder(folder: Path, tmp_path: Path) -> Path:
    """The same with a large vocabulary."""
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 32_000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture(scope="module")
def common(folder: Path) -> Plan:
    """The plan of a run that others differ from."""
    return plan_of(folder)


@pytest.fixture
def planned(folder: Path) -> Callable[..., Plan]:
    """The plan of a run that differs from the common one in some settings."""
    return partial(plan_of, folder)


def plan_of(
    folder: Path, *, new: int = 64, batch_size: int = 16, trainer: dict[str, Any] | None = None, memory: float = 80.0,
    prompt_tokens: int = 64, evaluate: bool = False, teacher: dict[str, Any] | None = None, **settings: Any,
) -> Plan:  # fmt: skip
    scorer = LocalTeacher(str(folder), batch_tokens=512, **(teacher or {}))
    options = {"micro_batch_tokens": 512, "engine": LocalEngine(batch_size)} | settings
    module = OnPolicyDistillation(str(folder), {"sums": scorer}, **options)
    task = AdditionProblems(max_new_tokens=new)
    data = AlternatingTasks({"sums": task}, prompts_per_step=16, samples_per_prompt=2)
    return plan(
        module, data, {"accelerator": "cpu", **(trainer or {})}, evaluate=evaluate, prompt_tokens=prompt_tokens,
        device_memory=memory, tflops=1, bandwidth=10,
    )  # fmt: skip


def phase(made: Plan, name: str) -> Phase:
    return next(phase for phase in made.tasks[0].rehearsal.phases if phase.name == name)


# ---- what is counted ------------------------------------------------------------------------------------------------


def test_a_watch_counts_what_is_alive_at_the_worst_moment():
    watch = Watch()
    with watch.pretend():
        first = torch.empty(100)
        with watch.label("second"):
            second = first * 2
        del first
        third = second[:50] + 1  # a view takes nothing
        del second, third
        assert not any(watch.live.values())
    assert watch.peak == 400 + 400
    assert dict(watch.at_peak) == {"other": 400, "second": 400}
    assert watch.flops == 0


def test_a_watch_counts_products_and_keeps_the_square_of_attention_out_of_memory():
    watch, attend = Watch(), nn.functional.scaled_dot_product_attention
    with watch.pretend():
        query = torch.empty(2, 4, 512, 16, requires_grad=True)
        key = torch.empty(2, 2, 512, 16, requires_grad=True)
        out = attend(query, key, key, is_causal=True, enable_gqa=True)
        assert watch.flops == 2 * 2 * 2 * 4 * 512 * 512 * 16 // 2
        out.sum().backward()
        assert watch.peak < 4 * 2 * 4 * 512 * 512


def test_weights_are_all_there_and_nothing_else(common, folder):
    student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    parameters = sum(parameter.numel() for parameter in student.parameters())
    assert common.tasks[0].rehearsal.parameters == parameters
    for kind in ("student weights", "teachers' weights"):
        assert 4 * parameters <= phase(common, "load").bytes[kind] < 4 * parameters + 10_000  # rotary frequencies


@pytest.mark.parametrize(
    ("optimizer", "copies"),
    [
        (lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), 2),
        (lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9), 1),
        (lambda parameters: torch.optim.SGD(parameters, lr=1e-3), 0),
    ],
    ids=["adamw", "momentum", "sgd"],
)
def test_the_optimisers_own_class_tells_its_state(planned, optimizer, copies):
    made = planned(optimizer=optimizer)
    expected = copies * 4 * made.tasks[0].rehearsal.parameters
    assert phase(made, "rollout").bytes.get("optimiser state", 0) == pytest.approx(expected, rel=0.01)
    gradients = phase(made, "optimiser").bytes["gradients"]
    assert gradients == 4 * made.tasks[0].rehearsal.parameters


def test_memory_grows_with_the_setting_that_is_said_to_rule_it(common, planned):
    larger = planned(micro_batch_tokens=1024, batch_size=32)
    for name, kind in (("update", "activations"), ("rollout", "KV cache")):
        assert phase(larger, name).bytes[kind] == pytest.approx(2 * phase(common, name).bytes[kind], rel=0.02)
    for kind in ("student weights", "teachers' weights", "optimiser state"):
        assert phase(larger, "update").bytes[kind] == phase(common, "update").bytes[kind]


def test_shards_share_what_belongs_to_the_student(common, planned):
    strategy = ModelParallelStrategy(data_parallel_size=4, tensor_parallel_size=1)
    whole, shard = common, planned(trainer={"devices": 4, "strategy": strategy})
    for kind in ("student weights", "optimiser state", "gradients"):
        assert 4 * phase(shard, "update").bytes[kind] == pytest.approx(phase(whole, "update").bytes[kind], rel=0.01)
    assert phase(shard, "update").bytes["teachers' weights"] == phase(whole, "update").bytes["teachers' weights"]
    assert "gathered units" not in phase(whole, "update").bytes
    assert phase(shard, "update").bytes["gathered units"] > 0


def test_adapters_alone_have_gradients_and_optimiser_state(common, planned):
    made = planned(lora=LoraConfig(r=2, target_modules=["q_proj"]))
    for kind in ("gradients", "optimiser state"):
        assert 0 < phase(made, "optimiser").bytes[kind] < 0.1 * phase(common, "optimiser").bytes[kind]
    more = phase(made, "optimiser").bytes["student weights"] / phase(common, "optimiser").bytes["student weights"]
    assert 1 < more < 1.1


QUANTISED = {
    "4 bits": {"load_in_4bit": True},
    "twice": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "8 bits": {"load_in_8bit": True},
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights_take_what_those_of_bitsandbytes_take(name, tmp_path, student_tokenizer):
    settings = BitsAndBytesConfig(**QUANTISED[name])
    student = save_tiny(tmp_path, student_tokenizer, hidden_size=WIDTH, intermediate_size=160)
    adapters = LoraConfig(r=2, target_modules=["q_proj"])
    made = plan_of(student, lora=adapters, quantization=settings)
    plain = plan_of(student, lora=adapters)
    loaded = load_model(str(student), "float32", settings)
    whole = load_model(str(student), "float32")
    expected = sum(bytes_of(parameter) for parameter in loaded.parameters())
    saved = sum(parameter.nbytes for parameter in whole.parameters()) - expected
    assert saved > 0
    for phase_name in ("load", "rollout", "update"):
        less = phase(plain, phase_name).bytes["student weights"] - phase(made, phase_name).bytes["student weights"]
        assert less == saved, phase_name
    assert made.tasks[0].rehearsal.parameters == plain.tasks[0].rehearsal.parameters
    assert made.tasks[0].rehearsal.quantised > 0 == plain.tasks[0].rehearsal.quantised
    # The frozen weights themselves are not kept once more for the backward pass.
    assert phase(made, "update").bytes["activations"] <= phase(plain, "update").bytes["activations"]
    assert phase(made, "optimiser").bytes["gradients"] == phase(plain, "optimiser").bytes["gradients"]


def bytes_of(parameter: torch.Tensor) -> int:
    """With the scales of a quantised weight."""
    size = parameter.nbytes + (parameter.SCB.nbytes if getattr(parameter, "SCB", None) is not None else 0)
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        size, state = size + state.absmax.nbytes, state.state2
    return size


def test_quantised_weights_are_not_sharded(planned):
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    options = {
        "lora": LoraConfig(r=2, target_modules=["q_proj"]),
        "quantization": BitsAndBytesConfig(load_in_4bit=True),
    }
    with pytest.raises(ConfigurationError, match=r"model\.quantization"):
        planned(trainer={"devices": 2, "strategy": strategy}, **options)


def test_a_teacher_that_is_sharded_or_rests_takes_less(common, planned):
    trainer = {"devices": 4, "strategy": "ddp"}
    whole = phase(common, "teacher").bytes["teachers' weights"]
    resting = planned(teacher={"offload": True})
    assert phase(resting, "teacher").bytes["teachers' weights"] == whole
    assert "teachers' weights" not in phase(resting, "update").bytes
    sharded = planned(teacher={"sharded": True}, trainer=trainer)
    for name in ("teacher", "update"):
        assert phase(sharded, name).bytes["teachers' weights"] == pytest.approx(whole / 4, rel=0.01)
    assert 0 < phase(sharded, "teacher").bytes["gathered units"] <= whole
    assert "gathered units" not in phase(planned(trainer=trainer), "teacher").bytes


def test_an_offloaded_student_takes_main_memory_instead(planned):
    sizes = {"data_parallel_size": 4, "tensor_parallel_size": 1}
    sharded, offloaded = (
        planned(trainer={"accelerator": "gpu", "devices": 4, "strategy": kind(**sizes)})
        for kind in (ModelParallelStrategy, OffloadedModelParallelStrategy)
    )
    there, here = phase(offloaded, "optimiser").bytes, phase(sharded, "optimiser").bytes
    assert not there.keys() & {"student weights", "gradients", "optimiser state"}
    moved = sum(here[kind] for kind in ("student weights", "gradients", "optimiser state"))
    resting = phase(offloaded, "optimiser").offloaded
    assert offloaded.tasks[0].rehearsal.host >= resting >= moved
    assert phase(sharded, "optimiser").offloaded == 0
    for name in ("rollout", "update"):
        assert phase(offloaded, name).peak < phase(sharded, name).peak
        assert phase(offloaded, name).bytes["gathered units"] == phase(sharded, name).bytes["gathered units"] > 0
    # Each micro-batch brings the weights twice and takes the gradients back.
    work = phase(offloaded, "update")
    once = 2 * here["student weights"] + here["gradients"]
    assert work.moved == pytest.approx(once * offloaded.tasks[0].lengths.batches(512), rel=1e-3)
    assert phase(sharded, "update").moved == 0
    slow, quick = offloaded.tasks[0].seconds, sharded.tasks[0].seconds
    assert slow["offloaded layers"] == work.moved / offloaded.device.host_bandwidth
    assert slow["optimiser"] == 2 * resting / offloaded.device.host_bandwidth
    assert "offloaded layers" not in quick


def test_processes_share_the_episodes_and_ddp_takes_a_bucket(common, planned):
    one, four = common, planned(trainer={"devices": 4, "strategy": "ddp"})
    assert one.tasks[0].lengths.episodes == 4 * four.tasks[0].lengths.episodes
    assert phase(four, "update").bytes["DDP's buckets"] == phase(four, "optimiser").bytes["gradients"]


def test_checkpointing_trades_activations_for_work(common, planned):
    plain, patient = common, planned(activation_checkpointing=True)
    assert phase(patient, "update").peak < phase(plain, "update").peak
    work = [phase(made, "update").flops["backward"] for made in (plain, patient)]
    assert work[1] == pytest.approx(1.5 * work[0], rel=0.1)  # another forward pass


def test_work_is_two_flops_a_weight_and_token_and_twice_that_backward(planned):
    made = planned(new=8, prompt_tokens=56)  # short: attention is little
    rehearsal, lengths = made.tasks[0].rehearsal, made.tasks[0].lengths
    embedding = WIDTH * VOCABULARY
    tokens = lengths.episodes * lengths.sequence
    flops = phase(made, "update").flops
    # More than that: the head at the watched positions, which are many of these few.
    assert flops["forward"] == pytest.approx(2 * (rehearsal.parameters - embedding) * tokens, rel=0.2)
    assert flops["backward"] == pytest.approx(2 * flops["forward"], rel=0.1)
    assert made.tasks[0].seconds["forward"] == flops["forward"] / 1e12


def test_mixed_precision_keeps_copies_of_the_weights_and_halves_activations(common, planned):
    full, mixed = common, planned(trainer={"precision": "bf16-mixed"})
    copies = phase(mixed, "update").bytes["weights in the compute type"]
    layers = phase(mixed, "update").bytes["student weights"] - 4 * WIDTH * VOCABULARY
    assert copies == pytest.approx(layers / 2, rel=0.05)
    assert "weights in the compute type" not in phase(full, "update").bytes
    assert phase(mixed, "update").bytes["activations"] < phase(full, "update").bytes["activations"]
    true, double = (planned(trainer={"precision": name}) for name in ("bf16-true", "64"))
    assert phase(double, "load").bytes["student weights"] == pytest.approx(
        2 * phase(full, "load").bytes["student weights"], rel=0.01
    )
    assert 2 * phase(true, "load").bytes["student weights"] == pytest.approx(
        phase(full, "load").bytes["student weights"], rel=0.01
    )


@pytest.mark.parametrize("objective", [LocalSupportMatching(k=8, source="union"), SampledToken(), FullVocabulary()])
def test_every_objective_is_rehearsed_and_one_makes_all_logits(wide_folder, objective):
    made = plan_of(wide_folder, objective=objective, micro_batch_tokens=4096)
    logits_and_gradient = made.tasks[0].rehearsal.logits_never_made
    found = phase(made, "update").bytes
    head = found.get("head's buffers", 0) + found.get("backward's temporaries", 0)
    assert (head > logits_and_gradient) == isinstance(objective, FullVocabulary)


def test_the_evaluation_of_teachers_is_planned_where_it_happens(common, planned):
    names = [phase.name for phase in planned(evaluate=True).tasks[0].rehearsal.phases]
    assert names == ["load", "evaluation", "rollout", "teacher", "update", "optimiser"]
    assert "evaluation" not in [phase.name for phase in common.tasks[0].rehearsal.phases]


# ---- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "setting"), [("update", "micro_batch_tokens"), ("rollout", "batch_size")])
def test_following_the_advice_makes_it_fit(planned, name, setting):
    large: dict[str, Any] = {
        "update": {"micro_batch_tokens": 4096, "batch_size": 2},
        "rollout": {"micro_batch_tokens": 64, "batch_size": 32},
    }[name]
    phases = sorted(planned(**large).tasks[0].rehearsal.phases, key=lambda phase: phase.peak)
    assert phases[-1].name == name
    memory = (phases[-1].peak + phases[-2].peak) / 2 / USABLE / GIB
    made = planned(**large, memory=memory)
    assert not made.fits
    assert all(line.startswith(f"{name} of sums needs") for line in made.advice)
    (line,) = (line for line in made.advice if setting in line)
    fitting = int(re.search(rf"{setting} to (\d+)", line)[1])
    better = planned(**(large | {setting: fitting}), memory=memory)
    assert better.fits
    assert not better.advice


def test_what_is_too_large_whatever_the_batches_is_told_with_other_ways_out(planned):
    made = planned(memory=1e-4)
    assert not made.fits
    assert any("trainer.precision=bf16-true saves" in line for line in made.advice)


def test_checkpointing_is_the_first_advice_for_an_update_that_is_too_large(planned):
    peak = phase(planned(activation_checkpointing=True), "update").peak
    made = planned(memory=peak / USABLE / GIB)
    assert f"model.activation_checkpointing=true makes it {peak / GIB:.2f} GiB" in made.advice[0]


def test_a_sequence_that_is_too_long_alone_is_to_be_shorter(planned):
    limit = 0.9 * phase(planned(new=1024, micro_batch_tokens=100), "update").peak
    made = planned(new=1024, micro_batch_tokens=100, memory=limit / USABLE / GIB)
    (line,) = (line for line in made.advice if "one sequence alone is too long" in line)
    assert line.startswith("update")
    shorter = int(re.search(r"max_new_tokens to (\d+)", line)[1])
    assert 512 < shorter < 1024
    assert phase(planned(new=shorter, micro_batch_tokens=100), "update").peak <= limit


# ---- the command ----------------------------------------------------------------------------------------------------


def command(settings: dict[str, Any], folder: Path) -> list[str]:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return ["plan", "--config", str(path)]


def test_the_command_prints_a_table_and_writes_a_file(settings, run, tmp_path, capsys):
    """On GPUs that are not there."""
    settings["trainer"] |= {"accelerator": "gpu", "devices": 8}
    settings["data"]["prompts_per_step"] = 8
    file = tmp_path / "plan.json"
    assert run(*command(settings, tmp_path), "--json", str(file), "--prompt_tokens", "100") == 0
    printed = capsys.readouterr().out
    assert "rollout" in printed
    assert "it fits" in printed
    assert "prompts of 100 tokens in sums (--prompt_tokens sets it" in printed
    made = json.loads(file.read_text())
    assert made["machine"]["processes"] == 8
    assert made["tasks"]["sums"]["lengths"]["prompt"] == 100
    assert made["fits"] is True


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompt_tokens", "0"], "prompt_tokens=0"),
        (["--device_memory", "-1"], "device_memory=-1"),
        (["--trainer.strategy", "deepspeed"], "deepspeed"),
        (["--data.tasks.sums.init_args.max_new_tokens", "256"], "max_new_tokens=256"),
        (["--json", "/no/such/folder/plan.json"], "/no/such/folder/plan.json"),
        (["--model.student", "./no/such/student"], "./no/such/student"),
    ],
)
def test_a_mistake_is_told_in_one_line(settings, run, tmp_path, capsys, arguments, named):
    assert run(*command(settings, tmp_path), *arguments) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_class_of_ones_own_cannot_be_planned(planned):
    class Elsewhere(LocalEngine.__bases__[0]):  # type: ignore[misc]
        sync = converse = None

    with pytest.raises(ConfigurationError, match="Elsewhere"):
        planned(engine=Elsewhere())


def test_what_servers_do_is_left_out_and_said(planned, common):
    servers = Servers(urls=["http://10.0.0.1:8000"])
    made = planned(engine=VLLMEngine(servers))
    left = [phase.name for phase in common.tasks[0].rehearsal.phases if phase.name != "rollout"]
    assert [phase.name for phase in made.tasks[0].rehearsal.phases] == left
    assert "rollout replica" not in phase(made, "update").bytes
    assert (common.served, made.served) == ([], ["rollouts"])
    tight = planned(engine=VLLMEngine(servers), memory=0.001)
    assert tight.advice  # no word about an engine that is not there
    assert not [line for line in tight.advice if "engine" in line]


def sharing(*options: str, colocated: bool = True) -> VLLMEngine:
    launch = Launch(command=["vllm", *options], colocated=colocated)
    return VLLMEngine(Servers(launch=launch), dtype="bfloat16")


def test_a_server_on_the_same_device_takes_its_share_while_it_writes(planned, common):
    share = "--gpu-memory-utilization=0.25"
    made = planned(engine=sharing(share), memory=1.0)
    assert [phase.name for phase in made.tasks[0].rehearsal.phases] == [
        phase.name for phase in common.tasks[0].rehearsal.phases
    ]
    found = phase(made, "rollout").bytes
    of_server = {kind: size for kind, size in found.items() if kind.startswith("vLLM server")}
    assert sum(of_server.values()) == GIB // 4
    assert of_server["vLLM server's weights"] == 2 * made.tasks[0].rehearsal.parameters
    standing = ("student weights", "optimiser state", "teachers' weights")
    assert {kind: found[kind] for kind in found.keys() - of_server.keys()} == {
        kind: phase(common, "rollout").bytes[kind] for kind in standing
    }
    for name in ("load", "teacher", "update", "optimiser"):
        assert phase(made, name).bytes == phase(planned(engine=sharing(share, colocated=False)), name).bytes
    # It works as much as an engine here would, and is no matter of others.
    assert phase(made, "rollout").flops == phase(planned(batch_size=32, memory=1.0), "rollout").flops
    assert made.served == []
    larger = planned(engine=sharing("--gpu-memory-utilization=0.5"), memory=1.0)
    assert phase(larger, "rollout").peak - phase(made, "rollout").peak == GIB // 4


def test_a_share_that_is_too_large_is_told_with_the_one_that_fits(planned):
    made = planned(engine=sharing(), memory=0.125)  # vLLM takes more than a plan counts as usable
    assert not made.fits
    (line,) = made.advice
    share = re.search(r"lower --gpu-memory-utilization of its server to (0\.\d+)$", line)[1]
    assert planned(engine=sharing("--gpu-memory-utilization", share), memory=0.125).fits
    assert not planned(engine=sharing("--gpu-memory-utilization", str(float(share) + 0.002)), memory=0.125).fits


def test_a_share_that_does_not_hold_the_weights_is_refused(planned):
    with pytest.raises(ConfigurationError, match=r"--gpu-memory-utilization=0\.0001 is 0\.00 GiB"):
        planned(engine=sharing("--gpu-memory-utilization=0.0001"), memory=1.0)


@pytest.mark.parametrize(
    ("trainer", "processes", "shards"),
    [
        ({}, 1, 1),
        ({"devices": "2", "num_nodes": 3, "strategy": "ddp"}, 6, 1),
        ({"devices": [0, 1]}, 2, 1),
        ({"devices": "0,2,3"}, 3, 1),
        ({"devices": "1,"}, 1, 1),
        ({"strategy": "single_device"}, 1, 1),
        ({"strategy": SingleDeviceStrategy("cpu")}, 1, 1),
        ({"devices": 8, "strategy": ModelParallelStrategy(data_parallel_size=8, tensor_parallel_size=1)}, 8, 8),
    ],
)
def test_the_trainers_settings_come_to_processes(trainer, processes, shards):
    machine = machine_of({"accelerator": "gpu", **trainer} if trainer else {"accelerator": "cpu"})
    assert (machine.processes, machine.shards) == (processes, shards)


# ---- the large configurations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(HUB))
def test_models_of_the_large_configurations_are_built_without_memory(name):
    shape, parameters = HUB[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**shape))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("name", LARGE)
def test_the_large_configurations_are_planned(hub, run, tmp_path, name):
    """With one layer a model, which changes sizes and nothing else."""
    hub(1)
    file = tmp_path / "plan.json"
    assert run("plan", "--config", str(ROOT / "configs" / f"{name}.yaml"), "--json", str(file)) == 0
    made = json.loads(file.read_text())
    assert made["machine"]["gpu"] is True
    for task in made["tasks"].values():
        assert [phase["name"] for phase in task["phases"]][-1] == "optimiser"


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_the_large_configurations_fit(hub, run, tmp_path, name):
    hub()
    file = tmp_path / "plan.json"
    arguments = ["plan", "--config", str(ROOT / "configs" / f"{name}.yaml"), "--json", str(file)]
    arguments += ["--prompt_tokens", "1024"]
    assert run(*arguments, "--device_memory", "80") == 0
    assert json.loads(file.read_text())["fits"] is True
    assert run(*arguments, "--device_memory", "40") == 0
    assert json.loads(file.read_text())["fits"] is False


# ---- against a step that runs ---------------------------------------------------------------------------------------


class OneQuestion(Task):
    """The same length for all, as a plan assumes it."""

    max_new_tokens = 40

    def setup(self) -> None:
        pass

    def test_size(self) -> int:
        return 1

    def episode(self, split: str, index: int) -> Episode:
        return MathEpisode("A shop sold 7 cards on Monday and 5 on Tuesday. How many cards were sold?", "12")


def micro_batches_of(tokens: int, folder: Path) -> tuple[OnPolicyDistillation, AlternatingTasks]:
    """A run of one step's settings."""
    module = OnPolicyDistillation(
        str(folder), {"sums": LocalTeacher(str(folder), batch_tokens=2000)}, objective=LocalSupportMatching(k=8),
        mask="none", engine=LocalEngine(batch_size=32), micro_batch_tokens=tokens,
    )  # fmt: skip
    return module, AlternatingTasks({"sums": OneQuestion()}, prompts_per_step=1, samples_per_prompt=32)


@pytest.fixture
def found(student_folder: Path) -> tuple[dict[str, int], int]:
    """Bytes of the tensors that the phases of a real step make, and the length of its prompts."""
    module, data = micro_batches_of(1500, student_folder)
    peaks: dict[str, int] = {}
    prompts: list[int] = []

    def watch(name: str, owner: Any, function: str) -> None:
        right = getattr(owner, function)

        def watched(*arguments: Any, **options: Any) -> Any:
            if name == "teacher":
                prompts.extend(len(turn.prompt.ids) for turn in arguments[0])
            with Watch() as watch:
                result = right(*arguments, **options)
            peaks[name] = watch.peak
            return result

        setattr(owner, function, watched)

    watch("rollout", module, "rollout")
    watch("teacher", module.teachers["sums"], "score")
    watch("update", module, "update")
    Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, val_check_interval=10**9, check_val_every_n_epoch=None, max_epochs=-1,
        num_sanity_val_steps=0, use_distributed_sampler=False,
    ).fit(module, data)  # fmt: skip
    return peaks, max(prompts)


def without_what_stands(tokens: int, prompt: int, folder: Path) -> dict[str, int]:
    """Bytes that a plan sees in each phase besides weights and optimiser state."""
    module, data = micro_batches_of(tokens, folder)
    made = plan(
        module, data, {"accelerator": "cpu"}, evaluate=False, prompt_tokens=prompt, device_memory=1, tflops=1,
        bandwidth=1,
    )  # fmt: skip
    standing = {"student weights", "teachers' weights", "optimiser state", "rollout replica"}
    return {
        phase.name: sum(size for kind, size in phase.bytes.items() if kind not in standing)
        for phase in made.tasks[0].rehearsal.phases
    }


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec")
def test_tensors_of_a_real_step_take_what_its_plan_says(found, student_folder):
    peaks, prompt = found
    said = without_what_stands(1500, prompt, student_folder)
    for name, peak in peaks.items():
        assert said[name] == pytest.approx(peak, rel=0.1), name
    # Another run's plan does not fit.
    assert without_what_stands(1000, prompt, student_folder)["update"] < 0.8 * peaks["update"]


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("bench_plan", ROOT / "scripts" / "bench_plan.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("size", ["5M", "30M", "135M"])
def test_a_step_takes_what_its_plan_says(bench, tmp_path, size):
    row = bench.compare(size, tmp_path)
    for name in ("rollout", "teacher", "update"):
        assert row["planned"][name] == pytest.approx(row["measured"][name], rel=0.1)
