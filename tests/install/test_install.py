"""What pip puts on a machine, proven in fresh virtual environments.

Installing torch three times over would take minutes. So the environments borrow the running one's
dependencies through a folder of links that holds everything except this package, every .pth file and
hydra_plugins: an editable install that the tests themselves run from cannot make up for a missing file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
HYDRA_1_4 = ["hydra-core==1.4.0rc3", "omegaconf>=2.4.1rc1,<2.5"]

# Two lines, no config of its own, no import of ours.
FOREIGN_APP = "import hydra\nhydra.main(version_base=None)(lambda cfg: None)()\n"
#: what it shows for strategy=ddp where no plugin knows that group
UNTYPED = "strategy: ddp"

NOT_SOURCE = shutil.ignore_patterns(
    ".*", "__pycache__", "*.pyc", "build", "dist", "*.egg-info", "outputs", "multirun", "node_modules"
)


def run(*command: object, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run it with nothing of the running environment in its own, and show its output where it fails."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_CONSTRAINT")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True)
    if check and done.returncode:
        pytest.fail(f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done


@dataclass
class Environment:
    """A virtual environment without pip; the running environment's pip works on it."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found

    def pip(self, *words: object, cwd: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        cwd = cwd or self.folder
        return run(sys.executable, "-m", "pip", "--python", self.python, *words, cwd=cwd, check=check)

    def files(self) -> set[str]:
        return {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if not path.is_symlink()}


def borrowed_packages(folder: Path, without: tuple[str, ...] = ()) -> Path:
    """A folder of links to the running environment's packages, except this one's and those named."""
    folder.mkdir()
    here = [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    for entry in (entry for site in here if site.is_dir() for entry in site.iterdir()):
        name = entry.name
        ours = "nemo_dist_conf" in name or name in ("hydra_plugins", "__pycache__") or name.endswith(".pth")
        if not ours and not name.startswith(without or ("\0",)) and not (folder / name).exists():
            (folder / name).symlink_to(entry)
    return folder


def new_environment(folder: Path, packages: Path) -> Environment:
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    environment = Environment(folder)
    (environment.site_packages / "borrowed.pth").write_text(f"{packages}\n")
    return environment


def copy_of_checkout(folder: Path) -> Path:
    """The sources alone, so that no build writes into the checkout and no earlier build is picked up."""
    shutil.copytree(ROOT, folder, ignore=NOT_SOURCE)
    return folder


def build_wheel(source: Path, folder: Path) -> Path:
    words = ["wheel", "-q", "--no-deps", "--no-build-isolation", "--use-pep517", "-w", folder, source]
    run(sys.executable, "-m", "pip", *words, cwd=folder.parent)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return borrowed_packages(tmp_path_factory.mktemp("packages") / "borrowed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build_wheel(copy_of_checkout(folder / "source"), folder / "built")


@pytest.fixture
def environment(tmp_path: Path, packages: Path) -> Environment:
    return new_environment(tmp_path / "venv", packages)


def install_from_wheel(environment: Environment, wheel: Path, tmp_path: Path) -> None:
    # Without --no-deps: the running environment has to satisfy what the wheel says that it needs.
    environment.pip("install", "-q", "--no-index", wheel)


def install_from_folder(environment: Environment, wheel: Path, tmp_path: Path, *words: str) -> None:
    source = copy_of_checkout(tmp_path / "checkout")
    environment.pip("install", "-q", "--no-deps", "--no-build-isolation", "--use-pep517", *words, cwd=source)


def install_plainly(environment: Environment, wheel: Path, tmp_path: Path) -> None:
    install_from_folder(environment, wheel, tmp_path, ".")


def install_editable(environment: Environment, wheel: Path, tmp_path: Path) -> None:
    """As the README says: the mode that Hydra 1.3 can look into."""
    install_from_folder(environment, wheel, tmp_path, "-e", ".", "--config-settings", "editable_mode=compat")


def install_editable_strict(environment: Environment, wheel: Path, tmp_path: Path) -> None:
    install_from_folder(environment, wheel, tmp_path, "-e", ".", "--config-settings", "editable_mode=strict")


def install_editable_by_default(environment: Environment, wheel: Path, tmp_path: Path) -> None:
    install_from_folder(environment, wheel, tmp_path, "-e", ".")


def shown_strategy(environment: Environment, folder: Path) -> str:
    """What a foreign app in a folder of its own composes for ``strategy=ddp``."""
    folder.mkdir(exist_ok=True)
    (folder / "app.py").write_text(FOREIGN_APP)
    done = run(environment.python, "app.py", "--cfg", "job", "+strategy=ddp", cwd=folder)
    assert "nemo_dist_conf" not in done.stderr, done.stderr  # Hydra names the plugin that it cannot load
    return done.stdout.strip()


def check_recipe(environment: Environment, folder: Path) -> None:
    """The recipe shows its config outside the checkout, so it finds conf/ wherever the install put it."""
    folder.mkdir()
    done = run(environment.python, "-m", "nemo_dist_conf.train", "--cfg", "job", cwd=folder)
    for group in ("strategy", "parallelism", "model", "data", "optimizer", "train"):
        assert f"\n{group}:\n" in f"\n{done.stdout}", done.stdout + done.stderr
    assert list(folder.iterdir()) == []


def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def expected_members() -> set[str]:
    """Every source file of the checkout, where it belongs in the wheel."""
    python = [path for top in ("nemo_dist_conf", "hydra_plugins/nemo_dist_conf") for path in (ROOT / top).rglob("*.py")]
    names = {path.relative_to(ROOT).as_posix() for path in python}
    configs = [path for path in (ROOT / "conf").rglob("*") if path.suffix in (".yaml", ".py")]
    names |= {f"nemo_dist_conf/{path.relative_to(ROOT).as_posix()}" for path in configs}
    return names | {"nemo_dist_conf/py.typed"}


def test_wheel_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    """A package without __init__.py, a forgotten YAML or a stray top-level package would show here."""
    found = {name for name in members(wheel) if ".dist-info/" not in name}
    assert found == expected_members()
    assert {name.partition("/")[0] for name in found} == {"nemo_dist_conf", "hydra_plugins"}
    assert "hydra_plugins/__init__.py" not in found
    assert any(name.startswith("nemo_dist_conf/conf/") and name.endswith(".yaml") for name in found)


def test_wheel_says_where_the_plugin_is_and_carries_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = next(name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
        licence = archive.read(f"{info}/licenses/LICENSE").decode()
    assert "[hydra.plugins]" in points
    assert "hydra_plugins.nemo_dist_conf.search_path:NemoDistConfSearchPath" in points
    assert "Apache License" in licence
    header, _, readme = metadata.partition("\n\n")
    assert "Name: nemo_dist_conf" in header and "License: Apache-2.0" in header
    assert readme.strip() == (ROOT / "README.md").read_text().strip()


def test_source_distribution_builds_the_same_wheel(tmp_path: Path, wheel: Path) -> None:
    source = copy_of_checkout(tmp_path / "source")
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path / "sdist", cwd=source)
    (archive,) = (tmp_path / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    rebuilt = build_wheel(unpacked, tmp_path / "built")
    assert members(rebuilt) == members(wheel)
    with zipfile.ZipFile(rebuilt) as one, zipfile.ZipFile(wheel) as other:
        differing = [name for name in one.namelist() if "RECORD" not in name and one.read(name) != other.read(name)]
    assert differing == []


def test_without_the_package_the_environment_knows_no_strategy(environment: Environment, tmp_path: Path) -> None:
    """The counterpart that gives the tests below their meaning: nothing of ours leaks into these environments."""
    assert shown_strategy(environment, tmp_path / "app") == UNTYPED
    found = run(environment.python, "-c", "import nemo_dist_conf", cwd=tmp_path, check=False)
    assert "ModuleNotFoundError" in found.stderr


@pytest.mark.parametrize("install", [install_from_wheel, install_plainly, install_editable, install_editable_strict])
def test_installed_package_is_found_works_anywhere_and_goes_without_a_trace(
    install, environment: Environment, wheel: Path, tmp_path: Path
) -> None:
    before = environment.files()
    install(environment, wheel, tmp_path)

    top_level = {path.name for path in environment.site_packages.iterdir()}
    assert not top_level & {"conf", "tests", "benchmarks", "examples", "docs"}
    assert not (environment.site_packages / "hydra_plugins" / "__init__.py").exists()

    assert "broadcast_buffers: false" in shown_strategy(environment, tmp_path / "app")

    check_recipe(environment, tmp_path / "outside")

    environment.pip("uninstall", "-q", "-y", "nemo_dist_conf")
    after = environment.files()
    assert before - after == set()
    # pip leaves the emptied folder of a namespace that other plugins may share.
    shared = environment.site_packages / "hydra_plugins"
    assert {name for name in after - before if environment.folder / name != shared} == set()
    assert not shared.exists() or list(shared.iterdir()) == []
    assert shown_strategy(environment, tmp_path / "app") == UNTYPED


def test_default_editable_install_is_not_seen_by_this_hydra(
    environment: Environment, wheel: Path, tmp_path: Path
) -> None:
    """Why the README names a mode. When this fails, Hydra or setuptools got better and the README can get shorter."""
    import hydra

    if not hydra.__version__.startswith("1.3."):
        pytest.skip(f"Hydra {hydra.__version__} reads the entry point")
    install_editable_by_default(environment, wheel, tmp_path)
    assert shown_strategy(environment, tmp_path / "app") == UNTYPED


@pytest.fixture(scope="module")
def newer_hydra(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Wheels of Hydra 1.4 and its OmegaConf."""
    folder = tmp_path_factory.mktemp("hydra")
    words = ["download", "-q", "--no-deps", "--pre", "--timeout", "20", "--retries", "1", "-d", folder, *HYDRA_1_4]
    done = run(sys.executable, "-m", "pip", *words, cwd=folder, check=False)
    if done.returncode:
        pytest.skip(f"{' '.join(HYDRA_1_4)} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
    return sorted(folder.glob("*.whl"))


@pytest.mark.parametrize("install", [install_from_wheel, install_editable_by_default, install_editable])
def test_hydra_1_4_finds_the_plugin_once(install, newer_hydra: list[Path], wheel: Path, tmp_path: Path) -> None:
    """By its entry point alone (a default editable install), and not twice where the namespace shows it too."""
    older = ("hydra", "omegaconf")
    environment = new_environment(tmp_path / "venv", borrowed_packages(tmp_path / "borrowed", without=older))
    environment.pip("install", "-q", "--no-deps", *newer_hydra)
    install(environment, wheel, tmp_path)
    assert "broadcast_buffers: false" in shown_strategy(environment, tmp_path / "app")
    listing = "from hydra.core.plugins import Plugins; print(*Plugins.instance().discover())"
    found = run(environment.python, "-c", listing, cwd=tmp_path).stdout
    assert found.count("NemoDistConfSearchPath") == 1
    check_recipe(environment, tmp_path / "outside")
