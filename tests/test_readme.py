"""What the README says is there and runs."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = {
    language: re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) for language in ("bash", "python", "yaml")
}
COMMANDS = [
    line for block in BLOCKS["bash"] for line in block.replace("\\\n", " ").splitlines() if line and line[0] != "#"
]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = {shlex.split(line, comments=True)[1] for line in COMMANDS if line.startswith("make ")}
    assert targets >= {"quickstart", "test", "test-tokenalign"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_continuous_integration_runs_the_test_commands_of_the_readme():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    called = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert called == [line.split(" #")[0].strip() for line in COMMANDS if line.startswith("make test")]
    assert called == ["make test", "make test-tokenalign"]


@pytest.mark.parametrize("command", [line for line in COMMANDS if " fit " in line and "my.yaml" not in line])
def test_commands_parse_and_build(command, run, monkeypatch):
    monkeypatch.chdir(ROOT)
    built = []
    monkeypatch.setattr(Trainer, "fit", lambda self, model, datamodule=None, **_: built.append(model))
    words = shlex.split(command, comments=True)
    assert words[:3] == ["python", "-m", "lsm_lightning"]
    assert run(*words[3:]) == 0
    assert len(built) == 1


def test_files_and_links_exist():
    mentioned = re.findall(r"`((?:configs|lsm_lightning|scripts|tokenalign)/[\w./]*)`", README)
    mentioned += [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(mentioned) > 10
    assert [path for path in mentioned if not (ROOT / path).exists()] == []


def test_the_task_of_the_readme_trains(tmp_path, student_folder):
    """The task in its code block, one step with the YAML beside it."""
    (code,) = [block for block in BLOCKS["python"] if "class Reverse(" in block]
    (settings,) = [block for block in BLOCKS["yaml"] if "reverse.Reverse" in block]
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    (tmp_path / "reverse.py").write_text(code)
    (tmp_path / "reverse.yaml").write_text(settings.replace("path/of/teacher", str(student_folder)))
    arguments = f"""fit --config reverse.yaml --model.student {student_folder} --trainer.max_steps 1
        --trainer.accelerator cpu --trainer.logger false --data.prompts_per_step 2 --data.samples_per_prompt 1"""
    done = subprocess.run(
        [sys.executable, "-m", "lsm_lightning", *arguments.split()],
        cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "reverse" in done.stdout


def test_tokenalign_alone_is_used_as_the_readme_says(student_folder, capsys):
    (code,) = [block for block in BLOCKS["python"] if "to_teacher" in block]
    assert len([line for line in code.splitlines() if line.strip()]) <= 6
    names = {"ids": [[65, 66, 67]], "response_mask": [[False, True, True]]}
    exec(re.sub(r"path/of/\w+", str(student_folder), code), names)
    assert names["keep"].tolist() == [[False, True, True]]
    assert len(names["teacher"].ids) == 1
    assert "policy" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_clean_clone_in_a_folder_with_a_space_runs_twice(tmp_path):
    """`make quickstart`, cut short, as a new user would run it; needs the package registry."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout to clone")
    clone = tmp_path / "a clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    for _ in range(2):
        arguments = "ARGS=--trainer.max_steps=2 --data.eval_problems=6"
        done = subprocess.run(["make", "quickstart", arguments], cwd=clone, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        assert (clone / "runs" / "quickstart" / "summary.json").exists()
