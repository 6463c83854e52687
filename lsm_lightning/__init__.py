"""On-policy distillation of language models by local support matching (arXiv 2603.25562), on PyTorch Lightning."""

__version__ = "0.1.0"
