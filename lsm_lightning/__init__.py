"""On-policy distillation of language models by local support matching (arXiv 2603.25562), on PyTorch Lightning."""

import os

# Threads that spin while they wait cost a busy machine up to five times the time; this must precede torch's import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

__version__ = "0.1.0"
