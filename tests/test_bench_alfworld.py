import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("textworld", reason="needs the alfworld extra")

REPOSITORY = Path(__file__).parent.parent
ARCHIVE = REPOSITORY.parent / "shared" / "data" / "alfworld" / "games.tar.xz"


def bench(folder: Path, *arguments: str) -> dict[str, list[dict[str, float]]]:
    """What the script writes; in a process of its own, where types are not checked at every call."""
    out = folder / "bench.json"
    command = [sys.executable, str(REPOSITORY / "scripts" / "bench_alfworld.py"), "--out", str(out), *arguments]
    subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    return json.loads(out.read_text())


def test_all_tables_are_filled(tmp_path):
    sizes = "--worlds mini --count 1 --commands 2 --samples 1 --generate 6 --workers 0 1"
    results = bench(tmp_path, *sizes.split())
    assert [row["engine"] for row in results["The engines"]] == ["stock", "ours"]
    assert all(row["won"] == row["plans played"] == row["task types"] == 6 for row in results["The generator"])
    assert {row["workers"] for row in results["Episodes in lock step, wall time"]} == {0, 1}


@pytest.mark.slow
def test_the_speed_that_the_documentation_promises(tmp_path):
    if not ARCHIVE.is_file():
        pytest.skip("the archive of genuine games is not there")
    with tarfile.open(ARCHIVE) as archive:
        members = [m for m in archive if "/valid_seen/" in m.name and m.name.endswith("game.tw-pddl")]
        archive.extractall(tmp_path, members, filter="data")
    results = bench(tmp_path, "--games", str(tmp_path), "--workers", "0")
    stock, ours = (row for row in results["The engines"] if row["games"] == "genuine")
    assert ours["commands/s"] >= 200
    assert ours["commands/s"] >= 10 * stock["commands/s"]
    (genuine,) = (row for row in results["Beginning a game"] if row["games"] == "genuine")
    assert genuine["kept in a file, ms"] < genuine["anew, ms"] / 4
    assert all(row["games/s"] >= 100 for row in results["The generator"])
