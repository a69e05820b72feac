"""Where torch comes in: typed configs, meshes, and one module per technique."""
