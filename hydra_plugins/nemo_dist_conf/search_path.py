"""Registers the config groups in every Hydra app of this environment.

Hydra 1.3 runs this module before it is in sys.modules, maybe twice, and an error here would stop
every app: so no dataclass, no state, no work at import.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

__all__ = ["NemoDistConfSearchPath"]


class NemoDistConfSearchPath(SearchPathPlugin):
    """Hydra calls it before it composes, for @hydra.main, compose(), help, completion and sweeps alike."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        from nemo_dist_conf.composition.groups import register_groups

        register_groups(search_path)
