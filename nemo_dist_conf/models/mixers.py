"""What mixes the tokens of a row, family by family, as far as it is known without building a model."""

from __future__ import annotations

__all__ = ["EXCHANGED_FAMILIES"]

#: Families of which tests prove that context parallelism computes what one process does; others are tried when they
#: are built. Tests: tests/dist/test_context_parallel.py.
EXCHANGED_FAMILIES = frozenset({"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"})
