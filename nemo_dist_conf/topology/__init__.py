"""Integers and names: sizes and a world size become a mesh specification. No torch.

Imported module by module: composing needs the axes only.
"""
