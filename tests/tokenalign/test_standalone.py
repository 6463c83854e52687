import subprocess
import sys

import tokenalign

FRAMEWORKS = ("torch", "transformers", "lightning")


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
