import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import tokenalign

FRAMEWORKS = ("torch", "transformers", "lightning")
HERE = Path(__file__).parent
CHECKOUT = HERE.parent.parent / "tokenalign"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_imports_without_a_framework():
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in FRAMEWORKS)
    assert run(f"import sys; {blocked}import tokenalign").stderr == ""


def test_control_a_blocked_module_is_noticed():
    assert "ModuleNotFoundError" in run("import sys; sys.modules['numpy'] = None; import tokenalign").stderr


def test_all_lists_what_is_there():
    assert sorted(tokenalign.__all__) == tokenalign.__all__
    assert all(hasattr(tokenalign, name) for name in tokenalign.__all__)


@pytest.fixture
def installed(pytestconfig) -> importlib.metadata.Distribution:
    """The package as pip installed it, where `make test-tokenalign` runs with the settings of this folder."""
    if pytestconfig.inipath is None or pytestconfig.inipath.parent != HERE:
        pytest.skip("only `make test-tokenalign` installs the package")
    return importlib.metadata.distribution("tokenalign")


def test_no_framework_is_installed_beside_it(installed):
    assert [name for name in (*FRAMEWORKS, "lsm_lightning") if importlib.util.find_spec(name)] == []


def test_the_installed_package_is_tested_and_not_the_checkout(installed):
    assert Path(tokenalign.__file__) == Path(str(installed.locate_file("tokenalign/__init__.py")))
    assert CHECKOUT not in Path(tokenalign.__file__).parents


def test_every_module_is_installed_and_no_test(installed):
    there = {str(path) for path in installed.files or () if path.parts[0] == "tokenalign" and path.suffix != ".pyc"}
    sources = [path for path in CHECKOUT.rglob("*") if path.suffix == ".py" or path.name == "py.typed"]
    assert there == {path.relative_to(CHECKOUT.parent).as_posix() for path in sources}


def test_the_package_brings_its_readme_along(installed):
    assert (installed.metadata.get_payload() or "").strip() == (CHECKOUT / "README.md").read_text().strip()
