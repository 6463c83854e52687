import json
import subprocess
import sys

import pytest
import tokenizer_kit as kit
from tokenizers import Tokenizer, models, pre_tokenizers

import tokenalign as ta

GOOD = kit.byte_level().to_str()


def edited(change) -> bytes:
    spec = json.loads(GOOD)
    change(spec)
    return json.dumps(spec).encode()


BAD_FILES = {
    "nothing": (b"", "it is empty. Download or save it again"),
    "blanks": (b" \n\n", "it is empty"),
    "half": (GOOD[: len(GOOD) // 2].encode(), "is not valid JSON .* Download or save it again"),
    "no UTF-8": (b'{"\xff": 1}', "is not valid JSON"),
    "other JSON": (b'{"a": 1}', "neither a model nor a config. Give a tokenizer.json"),
    "a list": (b"[1, 2]", "neither JSON nor a sentencepiece model. Give one of these"),
    "a model that is none": (b'{"model": 3}', "its JSON is no tokenizer"),
    "no vocabulary": (b'{"model": {}}', "its JSON is no tokenizer .*vocab"),
    "an empty vocabulary": (edited(lambda s: s["model"].update(vocab={}) or s.update(added_tokens=[])), "is empty"),
    "a lone surrogate": (edited(lambda s: s["model"]["vocab"].update({"\ud800": 1})), r"token '\\ud800' is no text"),
    "an id below 0": (edited(lambda s: s["model"]["vocab"].update(x=-7)), "id -7 of b'x' is not within 0"),
    "an id without end": (edited(lambda s: s["model"]["vocab"].update(x=10**12)), "id 1000000000000 of b'x'"),
    "added tokens that are none": (
        edited(lambda s: s.update(added_tokens=[{"x": 1}])),
        "its JSON is no tokenizer .*id",
    ),
    "text": (b"hello world", "neither JSON nor a sentencepiece model"),
    "a line feed and noise": (b"\n\xff\x00noise", "no sentencepiece model|sentencepiece library"),
    "ranks": (b"IQ== 0\nIg== 1\n", "does not say how texts are split. Give a tiktoken.Encoding"),
    "a tekken.json without settings": (b'{"config": {}, "vocab": []}', "its JSON is no tokenizer"),
    "a tekken.json with too few tokens": (json.dumps(kit.tekken(vocab=[])).encode(), r"not those of the ranks 0\.\."),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_tokenizer_is_named_with_a_remedy(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / "some file").write_bytes(content)
    with pytest.raises(ValueError, match=f"some file: .*{message}"):
        ta.Pair(tmp_path / "some file", tmp_path / "some file")


def test_control_the_unchanged_file_is_read(tmp_path):
    (tmp_path / "some file").write_text(GOOD)
    assert ta.Pair(tmp_path / "some file", tmp_path / "some file").relation is ta.Relation.IDENTICAL


def test_what_only_the_library_finds_is_told_at_the_first_spelling(tmp_path):
    broken = edited(lambda spec: spec["model"]["merges"].append(["no", "such"]))
    (tmp_path / "tokenizer.json").write_bytes(broken)
    pair = ta.Pair(tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizers library cannot read it \(.*Download or save it again"):
        pair.flags([1])


@pytest.mark.parametrize("given", [3, None, b"x", [], object()])
def test_an_object_that_is_no_tokenizer_is_named(given):
    with pytest.raises(ValueError, match=f"{type(given).__name__} is no tokenizer. Give a path"):
        ta.Pair(given, given)


def test_a_path_to_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        ta.Pair(tmp_path / "nowhere", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json, tekken\.json or sentencepiece \.model"):
        ta.Pair(tmp_path, tmp_path)


def test_a_folder_with_several_models_asks_for_one(tmp_path):
    for name in ("a.model", "b.model"):
        (tmp_path / name).write_bytes(b"\n")
    with pytest.raises(ValueError, match=r"holds a\.model, b\.model\. Give the path of one of them"):
        ta.Pair(tmp_path, tmp_path)


def test_the_fast_form_is_preferred(tmp_path):
    (tmp_path / "tokenizer.json").write_text(GOOD)
    (tmp_path / "tokenizer.model").write_bytes(b"noise")
    assert ta.Pair(tmp_path, tmp_path).student.known == Tokenizer.from_str(GOOD).get_vocab_size()


@pytest.mark.parametrize(
    "tokenizer",
    [
        Tokenizer(models.WordPiece({"a": 0}, unk_token="a")),
        Tokenizer(models.BPE({"a": 0}, [], end_of_word_suffix="</w>")),
        Tokenizer(models.BPE({"a": 0}, [], continuing_subword_prefix="##")),
    ],
)
def test_tokens_that_do_not_tell_where_blanks_were_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"do not tell where blanks were\. Supported are byte-level"):
        ta.Pair(tokenizer, tokenizer)


def test_merges_over_words_without_a_prefix_are_refused():
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    assert ta.Pair(tokenizer, tokenizer).student.pieces == [b"a"]
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="BPE with Whitespace is not supported"):
        ta.Pair(tokenizer, tokenizer)


def test_libraries_are_imported_only_when_such_a_tokenizer_is_given(tmp_path):
    (tmp_path / "tokenizer.json").write_text(GOOD)
    blocked = "import sys; sys.modules['sentencepiece'] = sys.modules['tiktoken'] = None; import tokenalign as ta; "
    assert run(blocked + f"ta.Pair({str(tmp_path)!r}, {str(tmp_path)!r}).flags([1])") == ""
    (tmp_path / "m").write_bytes(kit.train_sentencepiece())
    assert 'pip install "tokenalign[sentencepiece]"' in run(blocked + f"ta.Pair(*[{str(tmp_path / 'm')!r}] * 2)")
    (tmp_path / "t").write_text(json.dumps(kit.tekken()))
    assert 'pip install "tokenalign[tiktoken]"' in run(blocked + f"ta.Pair(*[{str(tmp_path / 't')!r}] * 2).flags([1])")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
