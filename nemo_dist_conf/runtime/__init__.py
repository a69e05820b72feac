"""Where torch comes in: typed configs, meshes, and one module per technique."""

import nemo_dist_conf.ranks.telling
import nemo_dist_conf.runtime.ending  # noqa: F401  # registers itself for the exit, before whatever uses process groups

nemo_dist_conf.ranks.telling.install()
