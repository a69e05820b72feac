"""Metadata is in setup.cfg; only the list of packages has to be computed, because the wheel has three roots."""

from setuptools import find_packages, setup

# hydra_plugins is a namespace that all Hydra plugins share: only the part below it is ours, and an
# __init__.py directly in it would hide everybody else's.
PLUGINS = ["hydra_plugins." + name for name in find_packages("hydra_plugins")]

# conf/ lies beside the package, where it is easy to read, and is installed inside it: a top-level
# package named conf would be everybody's.
setup(
    packages=[*find_packages(include=["nemo_dist_conf", "nemo_dist_conf.*"]), "nemo_dist_conf.conf", *PLUGINS],
    package_dir={"nemo_dist_conf.conf": "conf"},
)
