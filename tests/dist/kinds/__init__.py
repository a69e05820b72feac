"""Kinds of models that people bring, each trained beside plain torch in one process."""

from tests.dist.kinds import of_ones_own, of_transformers
from tests.dist.kinds.difference import KINDS, TOWERS, difference
from tests.dist.kinds.of_ones_own import Block, Scale, Stack

__all__ = ["KINDS", "TOWERS", "Block", "Scale", "Stack", "difference", "of_ones_own", "of_transformers"]
