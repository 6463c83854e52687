"""Translations in a folder: equal to fresh ones, never trusted when damaged, and never in the way."""

import gzip
import json
import os
import stat
from dataclasses import asdict

import pytest

pytest.importorskip("textworld", reason="needs the alfworld extra")

from lsm_lightning.tasks.alfworld import translation
from lsm_lightning.tasks.alfworld.engine import Engine, ground
from lsm_lightning.tasks.alfworld.games import generate
from lsm_lightning.tasks.alfworld.translation import TranslationCache, translate, user_cache_folder


@pytest.fixture
def kept(tmp_path) -> TranslationCache:
    return TranslationCache(tmp_path / "a" / "cache")


@pytest.fixture
def translated(monkeypatch) -> list[str]:
    """Names of the games that were translated, in order."""
    names: list[str] = []
    right = translation.translate
    monkeypatch.setattr(translation, "translate", lambda game: names.append(game.name) or right(game))
    return names


def test_a_game_is_translated_once(kept, translated):
    games = [generate(0, index) for index in (0, 1)]
    first = [kept.translation(game) for game in games]
    again = [TranslationCache(kept.folder).translation(game) for game in games]
    assert again == first
    assert translated == [game.name for game in games]


def test_a_kept_game_plays_alike(kept):
    game, engine = generate(0, 4), Engine()
    played = []
    for cache in (None, kept, kept):
        texts = [engine.start(ground(game, cache))]
        for command in game.plan:
            texts += [*engine.admissible, engine.act(command)]
        assert engine.won
        played.append(texts)
    assert played[0] == played[1] == played[2]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
        lambda content: gzip.compress(b"[]"),
        lambda content: gzip.compress(b"{"),
        lambda content: gzip.compress(b"\xff"),
        lambda content: gzip.compress(json.dumps({"sas": "x"}).encode()),
        lambda content: gzip.compress(json.dumps(asdict(translate(generate(0, 0))) | {"objects": []}).encode()),
    ],
    ids=["empty", "half", "short", "flipped", "other", "no JSON", "no text", "fields", "shape"],
)
def test_a_damaged_file_is_made_anew(kept, translated, damage):
    game = generate(0, 0)
    right = kept.translation(game)
    (path,) = kept.folder.iterdir()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert kept.translation(game) == right
    assert path.read_bytes() == content
    assert len(translated) == 2


def test_another_translator_or_another_text_is_another_file(kept, translated, monkeypatch):
    game = generate(0, 0)
    kept.translation(game)
    monkeypatch.setattr(translation, "_translator", lambda: "99")
    kept.translation(game)
    kept.translation(generate(0, 0, split="test"))
    assert len(translated) == len(list(kept.folder.iterdir())) == 3


def test_the_folder_is_for_its_owner(kept):
    kept.translation(generate(0, 0))
    assert stat.S_IMODE(kept.folder.stat().st_mode) == 0o700


def test_a_folder_that_cannot_be_written_to_is_no_obstacle(tmp_path, translated):
    (tmp_path / "file").touch()
    kept = TranslationCache(tmp_path / "file")
    assert kept.translation(generate(0, 0)) == kept.translation(generate(0, 0))
    assert len(translated) == 2


def test_a_full_disk_leaves_nothing_behind(kept, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        kept.translation(generate(0, 0))
    assert list(kept.folder.iterdir()) == []
    kept.translation(generate(0, 0))
    assert [path.suffix for path in kept.folder.iterdir()] == [".gz"]


def test_the_users_cache_folder_is_where_the_system_has_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_folder() == tmp_path / "lsm_lightning" / "alfworld"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(user_cache_folder()) == "/home/somebody/.cache/lsm_lightning/alfworld"
