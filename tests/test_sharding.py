"""Models spread over two processes: every weight arrives, and they compute what they compute in one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from teachers import asked, teacher_at
from test_student import gradients, lora
from tiny import FAMILIES, save_tiny, tiny_model
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from two import by_two

from lsm_lightning import sharding as sharding_module
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.pretrained import load_model, load_skeleton
from lsm_lightning.rollout import Sampling
from lsm_lightning.rollout.base import Request
from lsm_lightning.sharding import OffloadedModelParallelStrategy, load_sharded
from lsm_lightning.student import adapt, checkpoint_activations, merged_parameters, whole
from lsm_lightning.types import Support, Turn

CPU = torch.device("cpu")


def own_share(turns: list[Turn]) -> list[Turn]:
    """Unequally many a process."""
    return turns[:2] if distributed.get_rank() == 0 else turns[2:]


def sharded(folder: Path, prepare: Callable[[PreTrainedModel], None] = lambda model: None, **options: Any) -> Any:
    """The model of a folder in float64 where its type is not of interest, and who loaded it."""
    loads = []

    def load() -> PreTrainedModel:
        loads.append(distributed.get_rank())
        model = load_model(str(folder), options.get("dtype", "float32"))
        prepare(model)
        return model

    def shape() -> PreTrainedModel:
        model = load_skeleton(str(folder))
        prepare(model)
        return model

    mesh = init_device_mesh("cpu", (2,))
    offload, compute_dtype = options.get("offload", False), options.get("compute_dtype")
    model = load_sharded(load, shape, mesh, device=CPU, compute_dtype=compute_dtype, offload=offload)
    return model, loads


def averaged(model: PreTrainedModel, turns: list[Turn]) -> dict[str, Tensor]:
    """The gradient of a step whose turns are shared out."""
    found = gradients(model, own_share(turns))
    return {name: whole(gradient) for name, gradient in found.items()}


def with_adapters(model: PreTrainedModel) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(distributed.get_rank())  # drawn otherwise by each process
        adapt(model, lora("q_proj", "down_proj"))


# ---- what each of two processes does --------------------------------------------------------------------------------


def arrives(folders: dict[str, Path], family: str) -> dict[str, Any]:
    model, loads = sharded(folders[family])
    return {
        "loads": loads,
        "weights": dict(merged_parameters(model)),
        "buffers": dict(model.named_buffers()),
        "end": model.generation_config.eos_token_id,
        "parts": [p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor)],
        "elements": [p.numel() for p in model.parameters()],
    }


def a_weight_is_forgotten(folders: dict[str, Path]) -> str:
    right = sharding_module.set_model_state_dict

    def forgetful(model: Any, weights: dict[str, Any], options: Any) -> None:
        weights.pop("model.norm.weight", None)
        right(model, weights, options=sharding_module.StateDictOptions(
            full_state_dict=True, broadcast_from_rank0=True, strict=False
        ))  # fmt: skip

    sharding_module.set_model_state_dict = forgetful
    try:
        sharded(folders["qwen2-untied"])
    except RuntimeError as error:
        return str(error)
    finally:
        sharding_module.set_model_state_dict = right
    return "nothing was noticed"


def a_folder_is_missing(folders: dict[str, Path]) -> str:
    try:
        sharded(folders["llama-tied"].parent / "nowhere")
    except ConfigurationError as error:
        return str(error)
    return "nothing was noticed"


def learns(folders: dict[str, Path], family: str, turns: list[Turn]) -> dict[str, dict[str, Tensor]]:
    full, _ = sharded(folders[family])
    half, _ = sharded(folders[family], compute_dtype=torch.bfloat16)
    lean, _ = sharded(folders[family], checkpoint_activations)
    lean.train()
    return {"full": averaged(full, turns), "half": averaged(half, turns), "checkpointed": averaged(lean, turns)}


def offloaded(folders: dict[str, Path], turns: list[Turn]) -> dict[str, Any]:
    """Where parts are after the strategy has moved the module to a device, for which the meta device stands."""
    model, _ = sharded(folders["qwen2-untied"], offload=True)
    found: dict[str, Any] = {"gradient": averaged(model, turns)}
    for strategy in (OffloadedModelParallelStrategy(), ModelParallelStrategy()):
        module = LightningModule()
        module.student = model
        strategy.parallel_devices, strategy._model = [torch.device("meta")], module
        strategy.cluster_environment = LightningEnvironment()
        strategy.model_to_device()
        found[type(strategy).__name__] = {
            "shards": {p.device.type for p in model.parameters()},
            "gradients": {p.grad.device.type for p in model.parameters() if p.grad is not None},
            "buffers": {buffer.device.type for buffer in model.buffers()},
            "module": module.device.type,
        }
    return found


def adapters(folders: dict[str, Path], turns: list[Turn]) -> dict[str, Any]:
    model, _ = sharded(folders["qwen2-untied"], with_adapters)
    before = {name: whole(p) for name, p in model.named_parameters()}
    found = averaged(model, turns)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in found:
                parameter.sub_(parameter.grad, alpha=100.0)
    return {"before": before, "gradient": found, "merged": dict(merged_parameters(model))}


def scores(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase, turns: list[Turn], **settings: Any
) -> dict[str, Any]:
    """What a teacher says and writes, with unequally many turns and lengths a process."""
    teacher = teacher_at(folders["teacher"], tokenizer, batch_tokens=40, **settings)
    mine = own_share(turns)
    first = asked(teacher, mine)
    length = 3 if distributed.get_rank() == 0 else 9
    requests = [Request(ids=[7, 8, 9], seed=seed) for seed in range(length)]
    player = teacher.player(Sampling())
    written = player.engine.generate(requests, Sampling(), max_new_tokens=length, turn_end=player.turn_end)
    return {"first": first, "written": [c.ids for c in written], "again": asked(teacher, mine)}


def everything(folders: dict[str, Path], turns: list[Turn], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        **{f"arrives {family}": arrives(folders, family) for family in FAMILIES},
        "forgotten": a_weight_is_forgotten(folders),
        "missing": a_folder_is_missing(folders),
        **{f"learns {family}": learns(folders, family, turns) for family in ("llama-tied", "qwen2-untied")},
        "offloaded": offloaded(folders, turns),
        "adapters": adapters(folders, turns),
        "teacher": scores(folders, tokenizer, turns),
        "sharded teacher": scores(folders, tokenizer, turns, sharded=True),
        "resting teacher": scores(folders, tokenizer, turns, sharded=True, offload=True),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory, student_tokenizer, teacher_folder) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    made = {family: save_tiny(root / family, student_tokenizer, family=family) for family in FAMILIES}
    return made | {"teacher": teacher_folder}


@pytest.fixture(scope="module")
def found(tmp_path_factory, folders, turns, student_tokenizer) -> list[dict[str, Any]]:
    """By both processes."""
    return by_two(everything, tmp_path_factory.mktemp("two"), folders, turns, student_tokenizer)


# ---- what came of it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_and_buffer_arrives_bit_for_bit(found, folders, family):
    whole_model = load_model(str(folders[family]), "float32")
    for rank in (0, 1):
        told = found[rank][f"arrives {family}"]
        assert told["loads"] == ([0] if rank == 0 else [])
        assert told["end"] == whole_model.generation_config.eos_token_id
        for ours, theirs in (
            (told["weights"], dict(whole_model.named_parameters())),
            (told["buffers"], dict(whole_model.named_buffers())),
        ):
            assert ours.keys() == theirs.keys()
            assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert len(told["parts"]) == len(told["elements"])  # nothing is whole on each
    assert sum(told["parts"]) < 0.6 * sum(told["elements"])


def test_a_weight_that_does_not_arrive_is_named(found):
    assert [one["forgotten"] for one in found] == 2 * [
        "1 weights were not loaded, or are not numbers: model.norm.weight."
    ]


def test_all_processes_tell_why_the_first_could_not_load(found):
    assert found[0]["missing"] == found[1]["missing"]
    assert "nowhere" in found[0]["missing"]


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], relative: float) -> None:
    assert ours.keys() == theirs.keys()
    a, b = (torch.cat([g[name].flatten().double() for name in theirs]) for g in (ours, theirs))
    assert (a - b).norm() <= relative * b.norm()


@pytest.mark.parametrize("family", ["llama-tied", "qwen2-untied"])
def test_shards_learn_what_the_whole_learns(found, folders, turns, family):
    """Each process weighs its own turns to 1, so the average is that of the two alone."""
    model = load_model(str(folders[family]), "float32")
    alone = [gradients(model, part) for part in (turns[:2], turns[2:])]
    mean = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]}
    for rank in (0, 1):
        learnt = found[rank][f"learns {family}"]
        assert_near(learnt["full"], mean, 1e-6)
        assert_near(learnt["checkpointed"], mean, 1e-6)
        assert_near(learnt["half"], mean, 0.05)
        assert {gradient.dtype for gradient in learnt["half"].values()} == {torch.float32}
        with pytest.raises(AssertionError):
            assert_near(learnt["half"], mean, 1e-4)  # it is computed in half precision


def test_an_offloaded_student_learns_alike_and_stays_in_main_memory(found):
    for rank in (0, 1):
        told, full = found[rank]["offloaded"], found[rank]["learns qwen2-untied"]["full"]
        assert told["gradient"].keys() == full.keys()
        assert [name for name in full if not torch.equal(told["gradient"][name], full[name])] == []
        ours, lightnings = (told[kind.__name__] for kind in (OffloadedModelParallelStrategy, ModelParallelStrategy))
        assert ours == {"shards": {"cpu"}, "gradients": {"cpu"}, "buffers": {"meta"}, "module": "meta"}
        assert lightnings["shards"] == {"meta"}


def test_gpus_and_main_memory_each_have_their_backend():
    strategy = OffloadedModelParallelStrategy()
    strategy.parallel_devices, strategy.cluster_environment = [torch.device("cuda", 0)], LightningEnvironment()
    assert strategy._get_process_group_backend() == "cpu:gloo,cuda:nccl"
    strategy.parallel_devices = [CPU]
    assert strategy._get_process_group_backend() == "gloo"


def test_sharded_adapters_are_the_first_processs_and_learn_alone(found, folders):
    ours, theirs = (one["adapters"] for one in found)
    for part in ("before", "gradient", "merged"):
        assert [name for name in ours[part] if not torch.equal(ours[part][name], theirs[part][name])] == []
    assert all("lora_" in name for name in ours["gradient"])
    assert any("lora_A" in name and value.abs().max() > 0 for name, value in ours["before"].items())
    start = dict(load_model(str(folders["qwen2-untied"]), "float32").named_parameters())
    moved = {name for name in start if not torch.equal(ours["merged"][name], start[name])}
    assert moved == {name for name in start if "q_proj.weight" in name or "down_proj.weight" in name}


@pytest.mark.parametrize("kind", ["sharded teacher", "resting teacher"])
def test_a_sharded_teacher_says_and_writes_what_a_whole_one_does(found, kind):
    for one in found:
        for when in ("first", "again"):
            ours, theirs = one[kind][when], one["teacher"][when]
            assert isinstance(ours, Support)
            assert ours.ids.tolist() == theirs.ids.tolist()
            torch.testing.assert_close(ours.log_probs, theirs.log_probs)
        assert one[kind]["written"] == one["teacher"]["written"]


def test_the_check_of_gradients_can_fail():
    one = {"weight": torch.ones(3)}
    with pytest.raises(AssertionError):
        assert_near({"weight": torch.tensor([1.0, 1.0, 1.001])}, one, 1e-6)


def test_the_tiny_models_differ_by_family():
    assert len({tiny_model(family).config.model_type for family in FAMILIES}) == len(FAMILIES)
