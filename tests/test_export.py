"""Runs of two steps, exported: the folder must hold what was trained, and nothing may be left half done."""

import errno
import json
import pickle
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from processes import LIGHTNINGS_ADVICE, started
from safetensors import safe_open
from test_training import assert_identical
from tiny import FAMILIES, SIZES, STUDENT_END, TEACHER_END, TEMPLATE, save_tiny, tiny_model
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lsm_lightning.export import write_student
from lsm_lightning.model_card import percent
from lsm_lightning.pretrained import load_model, load_tokenizer, render, turn_end_ids
from lsm_lightning.rollout import LocalEngine, Sampling
from lsm_lightning.rollout.base import Request

STRATEGIES: dict[str, dict[str, Any]] = {
    "one process": {"devices": 1},
    "two processes": {"devices": 2, "strategy": "ddp"},
    "two shards": {
        "devices": 2,
        "strategy": {
            "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
            "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "process_group_backend": "gloo"},
        },
    },
}
POLITE = TEMPLATE.replace("{% for", "Please.{% for", 1)
"""A chat template that differs from the student's own."""

pytestmark = LIGHTNINGS_ADVICE


@pytest.fixture(scope="module")
def base(student_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that ends its turn in two ways, and comes with a habit of sampling that the run does not share."""
    folder = save_tiny(tmp_path_factory.mktemp("base") / "student", student_tokenizer, seed=1)
    ends = student_tokenizer.convert_tokens_to_ids([STUDENT_END, TEACHER_END])
    GenerationConfig(eos_token_id=ends, repetition_penalty=1.7, do_sample=True, top_k=3).save_pretrained(folder)
    return folder


def finish_run(arguments: list[str], output: Path, processes: int = 1) -> None:
    with started(arguments, output, processes) as run:
        assert set(run.wait()) == {0}, run.said()


Finish = Callable[[str], Path]


@pytest.fixture(scope="module")
def settings_of_a_run(base: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two steps."""
    template = tmp_path_factory.mktemp("templates") / "polite.jinja"
    template.write_text(POLITE)
    teacher = {"class_path": "lsm_lightning.teacher.LocalTeacher", "init_args": {"path": str(teacher_folder)}}
    sums = {
        "class_path": "lsm_lightning.tasks.math.AdditionProblems",
        "init_args": {"digits": 1, "max_new_tokens": 6, "test_size": 3},
    }
    return {
        "model": {
            "student": str(base),
            "teachers": {"sums": teacher},
            "objective": {"class_path": "lsm_lightning.objectives.LocalSupportMatching", "init_args": {"k": 7}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            "sampling": {"temperature": 0.7, "top_p": 0.8},
            "chat_template": str(template),
        },
        "data": {"tasks": {"sums": sums}, "prompts_per_step": 4, "samples_per_prompt": 1},
        "trainer": {"max_steps": 2, "accelerator": "cpu"},
        "checkpoint": {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"},
    }


@pytest.fixture(scope="module")
def finished(settings_of_a_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Finish:
    """The folder of a run by the name of its strategy."""
    root = tmp_path_factory.mktemp("runs")

    def arguments(strategy: str) -> list[str]:
        path = root / f"{strategy}.yaml"
        trainer = {**settings_of_a_run["trainer"], **STRATEGIES[strategy], "default_root_dir": str(root / strategy)}
        path.write_text(yaml.safe_dump({**settings_of_a_run, "trainer": trainer}))
        return ["fit", "--config", str(path)]

    @cache
    def finish(strategy: str) -> Path:
        finish_run(arguments(strategy), root / f"{strategy}.txt", STRATEGIES[strategy]["devices"])
        return root / strategy

    return finish


@pytest.fixture
def spoilable(finished: Finish, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a run's newest version."""

    def copy(strategy: str) -> Path:
        return Path(shutil.copytree(finished(strategy) / "version_0", tmp_path / "run" / "version_0", symlinks=True))

    return copy


def last(run: Path) -> Path:
    return run / "version_0" / "checkpoints" / "last.ckpt"


def trained(checkpoint: Path, scratch: Path) -> dict[str, Tensor]:
    """The student's weights, read as torch's own tools do."""
    file = checkpoint
    if checkpoint.is_dir():
        dcp_to_torch_save(checkpoint, file := scratch / "whole.pt")
    weights = torch.load(file, weights_only=False)["state_dict"]
    return {name.removeprefix("student."): weight for name, weight in weights.items()}


def loaded(folder: Path, **options: Any) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model


def stored(folder: Path) -> set[str]:
    """Names of the weights in a model folder."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_exported_folder_holds_the_trained_weights(finished, run, base, tmp_path, monkeypatch, strategy):
    checkpoint = last(finished(strategy))
    assert checkpoint.is_dir() == (strategy == "two shards")
    weights = trained(checkpoint, tmp_path)
    with monkeypatch.context() as patch:  # neither teachers nor the base student's weights are needed
        patch.setattr(AutoModelForCausalLM, "from_pretrained", None)
        assert run("export", str(finished(strategy)), "-o", str(tmp_path / "student")) == 0
    model = loaded(tmp_path / "student")
    assert_identical(model.state_dict(), weights)
    ids = torch.arange(5, 25)[None]
    reference = load_model(str(base), "float32")
    untrained = reference(ids).logits
    reference.load_state_dict(weights)
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=0, atol=0)
    assert (model(ids).logits - untrained).abs().max() > 1e-2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_leaves_the_folder_that_an_export_makes(finished, run, tmp_path, strategy):
    assert run("export", str(finished(strategy)), "-o", str(tmp_path / "student")) == 0
    left = finished(strategy) / "version_0" / "student"
    names = {path.name for path in left.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert {path.name for path in (tmp_path / "student").iterdir()} == names
    assert [name for name in names if (left / name).read_bytes() != (tmp_path / "student" / name).read_bytes()] == []


def test_an_earlier_checkpoint_can_be_exported(finished, run, tmp_path):
    folder = finished("one process")
    for name in ("step=1", "last"):
        checkpoint = last(folder).with_name(f"{name}.ckpt")
        assert run("export", str(checkpoint), "-o", str(tmp_path / name)) == 0
        assert_identical(loaded(tmp_path / name).state_dict(), trained(checkpoint, tmp_path))
    first, second = (loaded(tmp_path / name).state_dict() for name in ("step=1", "last"))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_tied_weight_is_stored_once_and_tied_again(finished, run, tmp_path):
    assert run("export", str(finished("two shards")), "-o", str(tmp_path / "student")) == 0
    assert "lm_head.weight" not in stored(tmp_path / "student")
    model = loaded(tmp_path / "student")
    assert model.lm_head.weight is model.model.embed_tokens.weight


# ---- adapters -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(settings_of_a_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that trained adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    lora = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    settings = {**settings_of_a_run, "model": {**settings_of_a_run["model"], "lora": lora}}
    settings["trainer"] = {**settings["trainer"], "devices": 1, "default_root_dir": str(folder / "run")}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    finish_run(["fit", "--config", str(folder / "run.yaml")], folder / "output.txt")
    return folder / "run"


def test_adapters_are_exported_merged_or_alone(adapted, run, base, tmp_path):
    for words in ([], ["--adapter"]):
        assert run("export", str(adapted), "-o", str(tmp_path / "-".join(["student", *words])), *words) == 0
    ids = torch.arange(5, 25)[None]
    merged, left = loaded(tmp_path / "student"), loaded(adapted / "version_0" / "student")
    assert_identical(merged.state_dict(), left.state_dict())
    untrained = load_model(str(base), "float32")
    before = untrained(ids).logits
    alone = PeftModel.from_pretrained(untrained, tmp_path / "student---adapter").eval()
    torch.testing.assert_close(merged(ids).logits, alone(ids).logits)
    assert (merged(ids).logits - before).abs().max() > 1e-3
    weights = sum(path.stat().st_size for path in (tmp_path / "student---adapter").glob("*.safetensors"))
    assert weights < 0.5 * (tmp_path / "student" / "model.safetensors").stat().st_size


def test_adapters_that_were_not_trained_cannot_be_exported(adapted, finished, run, tmp_path, capfd):
    assert run("export", str(finished("one process")), "-o", str(tmp_path / "out"), "--adapter") == 2
    assert "No adapters were trained" in capfd.readouterr().err
    other = yaml.safe_load((adapted / "version_0" / "config.yaml").read_text())
    other["model"]["lora"]["init_args"]["target_modules"] = ["k_proj"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(other))
    assert run("export", str(adapted), "-o", str(tmp_path / "out"), "--config", str(tmp_path / "config.yaml")) == 2
    assert "other adapters" in capfd.readouterr().err


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwritten"])
def test_another_dtype_is_rounded_to(finished, run, tmp_path, overwrite):
    output = tmp_path / "student"
    if overwrite:
        save_tiny(output, AutoTokenizer.from_pretrained(finished("one process") / "version_0" / "student"), seed=9)
        (output / "model-00001-of-00002.safetensors").touch()
    arguments = ["export", str(finished("one process")), "-o", str(output), "--dtype", "bfloat16"]
    assert run(*arguments, *(["--overwrite"] if overwrite else [])) == 0
    weights = trained(last(finished("one process")), tmp_path)
    assert_identical(loaded(output, dtype="auto").state_dict(), {n: w.bfloat16() for n, w in weights.items()})
    assert not (output / "model-00001-of-00002.safetensors").exists()


def mixture() -> PreTrainedModel:
    """Its experts are one weight in memory and many on disk."""
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=340, **SIZES, **experts)).eval()


@pytest.mark.parametrize("family", [*FAMILIES, "mixture"])
def test_models_of_any_family_keep_names_and_values(student_tokenizer, tmp_path, family):
    model = mixture() if family == "mixture" else tiny_model(family)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}  # shards share no memory either
    ends = frozenset([1])
    write_student(
        tmp_path / "ours", model, weights, student_tokenizer, turn_end=ends, sampling=Sampling(), card="a card"
    )
    model.save_pretrained(tmp_path / "theirs")
    assert stored(tmp_path / "ours") == stored(tmp_path / "theirs")
    assert_identical(loaded(tmp_path / "ours").state_dict(), model.state_dict())


# ---- what comes with them -------------------------------------------------------------------------------------------


def test_the_exported_student_writes_what_the_engine_wrote(finished, run, base, tmp_path):
    """Greedily, whatever the base's own generation settings were."""
    folder = finished("one process")
    assert run("export", str(folder), "-o", str(tmp_path / "student")) == 0
    model, tokenizer = loaded(tmp_path / "student"), AutoTokenizer.from_pretrained(tmp_path / "student")
    reference = load_model(str(base), "float32")
    reference.load_state_dict(trained(last(folder), tmp_path))
    conversations = [[{"role": "user", "content": text}] for text in ("2+3", "Say apple", "now", "drink ink")]
    prompts = render(load_tokenizer(str(base), POLITE), conversations)
    engine = LocalEngine()
    engine.sync(reference)
    ends = frozenset(model.generation_config.eos_token_id)
    requests = [Request(ids=prompt, seed=0) for prompt in prompts]
    written = engine.generate(requests, Sampling(temperature=0.0), max_new_tokens=12, turn_end=ends)
    for messages, prompt, completion in zip(conversations, prompts, written, strict=True):
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert inputs["input_ids"][0].tolist() == prompt
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=12, temperature=None, top_p=None, top_k=None)
        assert answer[0, len(prompt) :].tolist() == list(completion.ids)
    base_says = load_model(str(base), "float32").generate(**inputs, do_sample=False, max_new_tokens=12)
    assert base_says[0].tolist() != answer[0].tolist()


def test_generation_settings_are_those_of_the_run(finished, run, base, student_tokenizer, tmp_path):
    assert run("export", str(finished("one process")), "-o", str(tmp_path / "student")) == 0
    settings = GenerationConfig.from_pretrained(tmp_path / "student")
    ends = turn_end_ids(load_model(str(base), "float32"), load_tokenizer(str(base), POLITE))
    assert settings.eos_token_id == sorted(ends)
    assert ends > {student_tokenizer.eos_token_id}
    assert (settings.do_sample, settings.temperature, settings.top_p, settings.top_k) == (True, 0.7, 0.8, 0)
    assert settings.repetition_penalty in (None, 1.0)
    assert settings.pad_token_id == student_tokenizer.pad_token_id


def test_the_template_of_the_run_goes_along(finished, run, base, tmp_path):
    assert run("export", str(finished("one process")), "-o", str(tmp_path / "student")) == 0
    conversation = [[{"role": "user", "content": "2+3"}]]
    tokenizer = load_tokenizer(str(tmp_path / "student"))
    assert render(tokenizer, conversation) == render(load_tokenizer(str(base), POLITE), conversation)
    assert render(tokenizer, conversation) != render(load_tokenizer(str(base)), conversation)


# ---- the card -------------------------------------------------------------------------------------------------------


def rows_of(card: str) -> dict[str, list[str]]:
    """Rows of all tables by their first cell."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line[:1] == "|"]
    return {cells[0]: cells[1:] for cells in lines}


def test_the_card_tells_where_the_student_comes_from(finished, run, base, teacher_folder, tmp_path):
    folder = finished("one process")
    assert run("export", str(folder), "-o", str(tmp_path / "student")) == 0
    card = (tmp_path / "student" / "README.md").read_text()
    summary = json.loads((folder / "version_0" / "summary.json").read_text())
    rows = rows_of(card)
    assert rows["sums"] == ["3", *(percent(summary[column]["sums"]) for column in ("before", "after", "teacher"))]
    assert rows["steps"] == ["2"]
    assert str(base) in rows["base student"][0]
    assert str(teacher_folder) in rows["teacher of sums"][0]
    assert "AdditionProblems" in rows["data of sums"][0]
    assert "k `7`" in rows["objective"][0]
    assert f"torch {torch.__version__}" in card
    _, _, settings = card.partition("````yaml\n")
    config = yaml.safe_load((folder / "version_0" / "config.yaml").read_text())
    assert yaml.safe_load(settings.partition("````")[0]) == config
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["library_name"] == "transformers"
    assert "base_model" not in metadata  # a folder is no hub id


@pytest.mark.parametrize("strategy", ["one process", "two shards"])
def test_the_card_of_an_unfinished_run_does_not_borrow_figures(finished, spoilable, run, tmp_path, strategy):
    """A checkpoint knows what was measured before training; the summary is of a later step."""
    checkpoints = spoilable(strategy) / "checkpoints"
    summary = json.loads((checkpoints.parent / "summary.json").read_text())
    assert run("export", str(checkpoints / "step=1.ckpt"), "-o", str(tmp_path / "student")) == 0
    rows = rows_of((tmp_path / "student" / "README.md").read_text())
    before, teacher = (percent(summary[column]["sums"]) for column in ("before", "teacher"))
    assert rows["sums"] == ["3", before, "not measured", teacher]
    assert rows["steps"] == ["1"]


# ---- finding a run --------------------------------------------------------------------------------------------------


def test_the_newest_version_is_the_one_of_the_highest_number(spoilable, run, tmp_path):
    version = spoilable("one process")
    for number, checkpoint in ((9, "last"), (10, "step=1")):
        shutil.copytree(version, version.with_name(f"version_{number}"))
        shutil.copy(
            version / "checkpoints" / f"{checkpoint}.ckpt",
            version.parent / f"version_{number}" / "checkpoints" / "last.ckpt",
        )
    assert run("export", str(version.parent), "-o", str(tmp_path / "student")) == 0
    assert_identical(
        loaded(tmp_path / "student").state_dict(), trained(version / "checkpoints" / "step=1.ckpt", tmp_path)
    )


def test_checkpoints_in_a_folder_of_their_own_are_found(spoilable, run, tmp_path):
    """Where the settings say, and as other loggers of Lightning lay out a run."""
    version = spoilable("one process")
    config = yaml.safe_load((version / "config.yaml").read_text())
    config["checkpoint"]["dirpath"] = str(tmp_path / "elsewhere")
    (version / "config.yaml").write_text(yaml.safe_dump(config))
    (version / "checkpoints").rename(tmp_path / "elsewhere")
    shutil.copytree(version, tmp_path / "other" / "lightning_logs" / "version_0")
    for source in (version.parent, tmp_path / "other"):
        assert run("export", str(source), "-o", str(tmp_path / "student"), "--overwrite") == 0


def test_settings_can_be_named(spoilable, run, tmp_path):
    version = spoilable("one process")
    (version / "config.yaml").rename(tmp_path / "elsewhere.yaml")
    arguments = ["export", str(version / "checkpoints" / "last.ckpt"), "-o", str(tmp_path / "student")]
    assert run(*arguments) == 2
    assert run(*arguments, "--config", str(tmp_path / "elsewhere.yaml")) == 0


def test_help_tells_of_the_command(run, capsys):
    for arguments, texts in (
        (["--help"], ["export RUN -o DIR"]),
        (["export", "--help"], ["version_3", "--overwrite", "--dtype", "vLLM", "python -m lsm_lightning export"]),
    ):
        with pytest.raises(SystemExit) as ended:
            run(*arguments)
        assert ended.value.code == 0
        told = capsys.readouterr().out
        assert [text for text in texts if text not in told] == []


# ---- mistakes and damage --------------------------------------------------------------------------------------------


class Opened:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def truncate(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def no_checkpoint(version: Path) -> str:
    shutil.rmtree(version / "checkpoints")
    return "has no checkpoint"


def no_settings(version: Path) -> str:
    (version / "config.yaml").unlink()
    return "config.yaml"


def broken_settings(version: Path) -> str:
    (version / "config.yaml").write_text("model: [")
    return "config.yaml"


def settings_of_another_run(version: Path) -> str:
    config = yaml.safe_load((version / "config.yaml").read_text())
    config["model"]["student"] = "embedded:student"
    (version / "config.yaml").write_text(yaml.safe_dump(config))
    return "embedded:student"


def no_base(version: Path) -> str:
    config = (version / "config.yaml").read_text()
    name = yaml.safe_load(config)["model"]["student"]
    (version / "config.yaml").write_text(config.replace(name, "/no/such/student"))
    return "/no/such/student"


def broken_summary(version: Path) -> str:
    truncate(version / "summary.json")
    return "summary.json"


def truncated_file(version: Path) -> str:
    truncate(version / "checkpoints" / "last.ckpt")
    return "last.ckpt"


def another_file(version: Path) -> str:
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, version / "checkpoints" / "last.ckpt")
    return "last.ckpt"


def another_model(version: Path) -> str:
    state = torch.load(version / "checkpoints" / "last.ckpt", weights_only=False)
    state["state_dict"]["student.model.norm.weight"] = torch.ones(5)
    torch.save(state, version / "checkpoints" / "last.ckpt")
    return "model.norm.weight is [5]"


def missing_weight(version: Path) -> str:
    state = torch.load(version / "checkpoints" / "last.ckpt", weights_only=False)
    del state["state_dict"]["student.model.norm.weight"]
    torch.save(state, version / "checkpoints" / "last.ckpt")
    return "model.norm.weight of the student is missing"


def untied_weight(version: Path) -> str:
    state = torch.load(version / "checkpoints" / "last.ckpt", weights_only=False)
    state["state_dict"]["student.lm_head.weight"] = state["state_dict"]["student.lm_head.weight"] + 1
    torch.save(state, version / "checkpoints" / "last.ckpt")
    return "lm_head.weight and model.embed_tokens.weight"


def code_inside(version: Path) -> str:
    state = torch.load(version / "checkpoints" / "last.ckpt", weights_only=False)
    torch.save({**state, "trap": Opened(version / "opened")}, version / "checkpoints" / "last.ckpt")
    return "last.ckpt"


FILE_MISTAKES = [
    no_checkpoint, no_settings, broken_settings, settings_of_another_run, no_base, broken_summary, truncated_file,
    another_file, another_model, missing_weight, untied_weight, code_inside,
]  # fmt: skip


def no_metadata(version: Path) -> str:
    (version / "checkpoints" / "last.ckpt" / ".metadata").unlink()
    return "last.ckpt"


def no_state(version: Path) -> str:
    (version / "checkpoints" / "last.ckpt" / "meta.pt").unlink()
    return "last.ckpt"


def no_shard(version: Path) -> str:
    (version / "checkpoints" / "last.ckpt" / "__1_0.distcp").unlink()
    return "last.ckpt"


def truncated_shard(version: Path) -> str:
    truncate(version / "checkpoints" / "last.ckpt" / "__1_0.distcp", 0.1)  # the optimiser's state comes last
    return "last.ckpt"


def truncated_metadata(version: Path) -> str:
    truncate(version / "checkpoints" / "last.ckpt" / ".metadata")
    return "last.ckpt"


def empty_folder(version: Path) -> str:
    for path in (version / "checkpoints" / "last.ckpt").iterdir():
        path.unlink()
    return "last.ckpt"


SHARD_MISTAKES = [no_metadata, no_state, no_shard, truncated_shard, truncated_metadata, empty_folder]


@pytest.mark.parametrize(
    ("strategy", "spoil"),
    [("one process", spoil) for spoil in FILE_MISTAKES] + [("two shards", spoil) for spoil in SHARD_MISTAKES],
    ids=lambda value: getattr(value, "__name__", value).replace("_", " "),
)
def test_a_damaged_run_is_told_in_one_line(spoilable, run, tmp_path, capfd, strategy, spoil):
    version = spoilable(strategy)
    expected = spoil(version)
    assert run("export", str(version), "-o", str(tmp_path / "student")) == 2
    told = capfd.readouterr().err
    assert told.startswith("error: ")
    assert len(told.splitlines()) == 1
    assert expected in told
    assert not (tmp_path / "student").exists()
    assert not (version / "opened").exists()


def test_the_trap_would_snap(tmp_path):
    pickle.loads(pickle.dumps(Opened(tmp_path / "opened")))
    assert (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    "arguments", [["no/such/run", "-o", "out"], ["."], [".", "-o", "out"], [".", "-o", "out", "--dtype", "int4"]]
)
def test_a_mistake_on_the_command_line_is_told_in_one_line(run, tmp_path, capfd, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert run("export", *arguments) == 2
    told = capfd.readouterr().err
    assert told.startswith("error: ")
    assert len(told.splitlines()) == 1


def test_what_lies_in_the_way_is_not_touched(finished, run, tmp_path, base, capfd):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("buy milk")
    (tmp_path / "file").write_text("text")
    model = shutil.copytree(base, tmp_path / "model")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    source = str(finished("one process"))
    for arguments, reason in (
        (["notes"], "not empty"),
        (["notes", "--overwrite"], "holds no model"),
        (["file", "--overwrite"], "is a file"),
        (["model"], "not empty"),
    ):
        assert run("export", source, "-o", str(tmp_path / arguments[0]), *arguments[1:]) == 2
        assert reason in capfd.readouterr().err
    assert run("export", source, "-o", source, "--overwrite") == 2
    assert run("export", source, "-o", str(base), "--overwrite") == 2
    assert "base student" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "empty").mkdir()
    for output in ("empty", "new/deep"):
        assert run("export", source, "-o", str(tmp_path / output)) == 0
    assert run("export", source, "-o", str(model), "--overwrite") == 0
    assert (model / "README.md").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("moment", ["tokenizer", "rename"])
def test_a_failed_write_leaves_no_half_folder(finished, run, base, tmp_path, monkeypatch, capfd, error, moment):
    former = shutil.copytree(base, tmp_path / "models" / "former")
    before = {path: path.read_bytes() for path in (tmp_path / "models").rglob("*") if path.is_file()}
    rename = Path.rename

    def fail(path: Path, *arguments: Any, **options: Any) -> Any:
        if moment == "rename" and path.name != "fresh":
            return rename(path, *arguments)
        raise error

    owner, name = (PreTrainedTokenizerFast, "save_pretrained") if moment == "tokenizer" else (Path, "rename")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        for output, status in (("fresh", ()), ("former", ("--overwrite",))):
            code = run("export", str(finished("one process")), "-o", str(tmp_path / "models" / output), *status)
            assert code == (2 if isinstance(error, OSError) else 130)
            told = capfd.readouterr().err
            assert len(told.splitlines()) == 1
            assert isinstance(error, KeyboardInterrupt) or "No space left" in told
    assert {path: path.read_bytes() for path in (tmp_path / "models").rglob("*") if path.is_file()} == before
    assert list((tmp_path / "models").iterdir()) == [former]
