"""The command line, from outside (`-P`: the installed package and not what lies in the folder) and through `main`."""

import json
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizer_kit import END, IM_END, TAGS, train, unreachable, with_tokens
from tokenizers import Tokenizer, normalizers

import tokenalign as ta
from tokenalign.__main__ import main
from tokenalign.visible import columns

TEXT = "<think>12 + 30</think> \\boxed{42}\n<|im_end|>"


def save(folder: Path, tokenizer: Tokenizer, template: str) -> str:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"chat_template": template, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("of") / "student", unreachable(train(), TAGS), IM_END)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("of") / "teacher", with_tokens(unreachable(train(), TAGS), TAGS), END)


@pytest.fixture(scope="module")
def lowering(tmp_path_factory) -> str:
    tokenizer = train()
    tokenizer.normalizer = normalizers.Lowercase()
    return save(tmp_path_factory.mktemp("of") / "lowering", tokenizer, IM_END)


def outside(*arguments: str, input: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-P", "-m", "tokenalign", *arguments]
    return subprocess.run(command, input=input, capture_output=True, env={**os.environ, **environment}, timeout=60)


def told(capsys, *arguments: str) -> dict:
    main([*arguments, "--json"])
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def commands(student: str, teacher: str) -> dict[str, list[str]]:
    return {
        "inspect": ["inspect", student, teacher],
        "align": ["align", student, teacher, TEXT],
        "explain": ["explain", student, teacher, TEXT],
        "selfcheck": ["selfcheck", student, teacher],
        "bench": ["bench", student, teacher, "--tokens", "2000"],
    }


@pytest.mark.parametrize(
    ("name", "status", "alone"),
    [("inspect", 1, 0), ("align", 1, 0), ("explain", 1, 0), ("selfcheck", 0, 0), ("bench", 0, 0)],
)
def test_status_and_one_json_document(capsys, student, teacher, name, status, alone):
    assert main(commands(student, teacher)[name]) == status
    text = capsys.readouterr()
    assert text.err == ""
    assert "\x1b" not in text.out
    assert all(columns(line) <= 100 for line in text.out.splitlines())
    assert main([*commands(student, teacher)[name], "--json"]) == status
    assert isinstance(json.loads(capsys.readouterr().out), dict)
    # A tokenizer beside itself is the control: nothing to handle.
    assert main(commands(student, student)[name]) == alone


def test_inspect_tells_the_report(capsys, monkeypatch, student, teacher):
    monkeypatch.setenv("COLUMNS", "100")
    pair = ta.Pair(student, teacher, tags=["<note>", "[x]"])
    arguments = ["inspect", student, teacher, "--tags", "<note>,[x]"]
    assert told(capsys, *arguments) == pair.report().to_dict()
    main(arguments)
    assert capsys.readouterr().out == f"{pair.report()}\n"


def test_align_tells_the_chunks(capsys, student, teacher):
    found = told(capsys, "align", student, teacher, TEXT)
    pair = ta.Pair(student, teacher)
    ids = [[token["id"] for token in found[side]] for side in ("student", "teacher")]
    expected = pair.align(*ids)
    assert found["chunks"] == expected.chunks.tolist()
    assert found["ok"]
    assert "".join(token["piece"] for token in found["student"]) == TEXT
    assert "".join(token["piece"] for token in found["teacher"]) == TEXT.replace("<|im_end|>", "<|end|>")
    assert found["one_to_one"] == sum(chunk == [1, 1] for chunk in found["chunks"]) / len(found["chunks"])


def test_explain_tells_flags_and_policies(capsys, student, teacher):
    found = told(capsys, "explain", student, teacher, TEXT)
    ids = [token["id"] for token in found["tokens"]]
    flags = ta.Pair(student, teacher).flags([ids])
    assert found["counts"] == flags.count()
    for policy in ("paper", "tags", "canonical", "strict"):
        dropped = [policy in token["dropped_by"] for token in found["tokens"]]
        assert dropped == (~flags.keep(policy)[0]).tolist()
        assert found["dropped"][policy] == sum(dropped)
    for token, bits in zip(found["tokens"], flags.bits[0].tolist(), strict=True):
        assert sum(ta.Flag[name] for name in token["flags"]) == bits


def test_explain_takes_ids_and_one_policy(capsys, student, teacher):
    tokenizer = Tokenizer.from_file(f"{student}/tokenizer.json")
    ids = [tokenizer.token_to_id(token) for token in ("<", "<think>", "a")]
    found = told(capsys, "explain", student, teacher, "--ids", str(ids), "--policy", "tags")
    assert [token["id"] for token in found["tokens"]] == ids
    assert found["dropped"].keys() == {"tags"}


def test_explain_shows_every_token_with_a_legend(capsys, student, teacher):
    main(["explain", student, teacher, TEXT])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["<", "<think>", "ptcs", "TAG"]
    assert "■ a tag that the teacher spells otherwise" in lines
    assert "■ an end of turn that the teacher writes otherwise" in lines
    assert any("⏎" in line for line in lines)


def test_explain_of_half_a_character(capsys, student):
    found = told(capsys, "explain", student, student, os.fsdecode(b"a\xe2\x82"))
    assert [token["flags"] for token in found["tokens"]] == [[], ["INVALID_UTF8"], ["INVALID_UTF8"]]


def test_text_from_a_file_and_from_standard_input(capsys, tmp_path, student, teacher):
    file = tmp_path / "text"
    file.write_bytes(TEXT.encode())
    expected = told(capsys, "align", student, teacher, TEXT)
    assert told(capsys, "align", student, teacher, "--file", str(file)) == expected
    for arguments in ([], ["--file", "-"]):
        run = outside("align", student, teacher, "--json", *arguments, input=TEXT.encode())
        assert json.loads(run.stdout) == expected
        assert run.returncode == 1


def test_selfcheck_finds_a_tokenizer_that_changes_text(capsys, tmp_path, lowering):
    found = told(capsys, "selfcheck", lowering)
    assert found["checks"]["lowering: bytes"]["wrong"] > 0
    assert "became" in found["checks"]["lowering: bytes"]["first"][0]
    assert main(["selfcheck", lowering]) == 1
    file = tmp_path / "corpus"
    file.write_text("all is low\nhere\n")
    assert main(["selfcheck", lowering, "--file", str(file)]) == 0


def test_selfcheck_counts_texts_and_tokens(capsys, tmp_path, student, teacher):
    file = tmp_path / "corpus"
    file.write_bytes(b"one\ntwo \xff three\n\n")
    found = told(capsys, "selfcheck", student, teacher, "--file", str(file))
    assert found["texts"] == 3
    assert found["tokens"].keys() == {"student", "teacher"}
    assert {check["right"] for check in found["checks"].values()} == {3}


def test_bench_measures_every_rate(capsys, student, teacher):
    found = told(capsys, *commands(student, teacher)["bench"])
    assert found["tokens"] == 2000
    assert len(found["tokens_per_second"]) == 4
    assert all(rate > 0 for rate in found["tokens_per_second"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere", "{student}"], "nowhere does not exist"),
        (["inspect", "{student}"], "the following arguments are required: B"),
        (["inspect", "{student}", "{student}", "--student-size", "x"], "'x' is no positive number"),
        (["inspect", "{student}", "{student}", "--student-size", "3"], "smaller than"),
        (["align", "{student}", "{student}", "a", "--file", "b"], "Give one of them"),
        (["align", "{student}", "{student}", "--file", "/nowhere/at/all"], "No such file"),
        (["explain", "{student}", "{student}", "--ids", "1 b"], "'b', which is no id"),
        (["explain", "{student}", "{student}", "--ids", "1 999999"], "id 999999 is outside"),
        (["explain", "{student}", "{student}", "a", "--policy", "none"], "policy 'none' is unknown"),
        (["explain", "{student}", "{student}", "a", "--ids", "1"], "Give one of them"),
        (["bench", "{student}", "{student}", "--file", "{empty}"], "the text is empty"),
        (["dance"], "invalid choice"),
        ([], "required: COMMAND"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, student, arguments, message):
    (tmp_path / "empty").write_text("")
    run = outside(*(a.format(student=student, empty=tmp_path / "empty") for a in arguments), "--json")
    assert run.returncode == 2
    assert run.stdout == b""
    assert message in run.stderr.decode()
    assert run.stderr.count(b"\n") == 1


def test_truncated_tokenizer_is_bad_input(tmp_path, student):
    broken = tmp_path / "tokenizer.json"
    broken.write_bytes(Path(student, "tokenizer.json").read_bytes()[:1000])
    run = outside("inspect", str(broken), student)
    assert run.returncode == 2
    assert run.stderr.count(b"\n") == 1


def test_colours_only_where_they_are_wanted(student, teacher):
    def coloured(*arguments: str, **environment: str) -> bool:
        return b"\x1b[" in outside("explain", student, teacher, TEXT, *arguments, **environment).stdout

    assert not coloured()
    assert coloured("--color", "always", NO_COLOR="1")
    assert not coloured("--color", "never")


@pytest.mark.parametrize(
    ("environment", "expected"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_a_terminal_is_coloured_unless_it_says_no(student, teacher, environment, expected):
    here, there = pty.openpty()
    settings = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"} | environment
    command = [sys.executable, "-P", "-m", "tokenalign", "explain", student, teacher, "<think>"]
    with subprocess.Popen(command, stdout=there, stdin=subprocess.DEVNULL, env=settings) as process:
        os.close(there)
        shown = b""
        while True:
            try:
                shown += os.read(here, 4096)
            except OSError:
                break
        process.wait()
    os.close(here)
    assert (b"\x1b[" in shown) == expected


def test_nobody_reads_to_the_end(student, teacher):
    """The reader is gone before anything is written."""
    command = [sys.executable, "-P", "-m", "tokenalign", "align", student, teacher, "word " * 20_000]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() in (0, 1)


def test_interrupted(capsys, monkeypatch, student, teacher):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenalign.commands.align", interrupt)
    assert main(["align", student, teacher, TEXT]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["inspect", "align", "explain", "selfcheck", "bench"])
def test_help_teaches_by_an_example(capsys, name):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  tokenalign {name} " in text
    assert "exit status" in text


def test_example_of_the_help_is_understood(capsys, student, teacher):
    with pytest.raises(SystemExit):
        main(["align", "--help"])
    example = capsys.readouterr().out.partition("example:\n  tokenalign ")[2].partition("\n")[0]
    arguments = [{"models/student": student, "models/teacher": teacher}.get(a, a) for a in shlex.split(example)]
    assert main(arguments) == 1


def test_help_does_not_build_anything():
    code = "import sys; from tokenalign.__main__ import _parser; _parser(); print('tokenalign.commands' in sys.modules)"
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "False"
