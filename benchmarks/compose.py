"""What the plugin costs a Hydra app that does not use it, and what the recipe takes to show or refuse a config.

    python benchmarks/compose.py --json benchmarks/results/compose.json --markdown benchmarks/results/compose.md

CPU seconds (user and system) of whole child processes, taken in turns so that a busy machine slows all of them alike.
The recipe's side "without" is its config in plain Hydra: the same groups, options and defaults as a tree of YAML, or
("typed") its groups as dataclasses in the ConfigStore, which check types as ours do (typed_recipe.py writes them).
"without" is the same interpreter and the same packages with this one left out: both sides run with `-S` from folders
of links, the second of which holds the plugin and is on one side's path only. Bytecode is compiled beforehand.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
from typed_recipe import typed_groups

APP = """
    import hydra

    @hydra.main(version_base="1.3", config_path="conf", config_name="config")
    def main(cfg):
        print(cfg.db.name)

    main()
"""
#: the plain app's config tree: one group of two options
TREE = {
    "config.yaml": "defaults:\n  - db: mysql\n  - _self_\nsteps: 10\n",
    "db/mysql.yaml": "name: mysql\nport: 3306\n",
    "db/postgresql.yaml": "name: postgresql\nport: 5432\n",
}
COMPLETION = {"COMP_LINE": "python app.py db=", "COMP_POINT": "17"}
#: Hydra 1.3 completes no `python -m`, so this line stands for both.
STRATEGY_COMPLETION = {"COMP_LINE": "python recipe.py strategy=", "COMP_POINT": "26"}
RECIPE = ("-m", "nemo_dist_conf.train")
COMPLETE = ("-sc", "query=bash")
AIM = 1.10


@dataclass(frozen=True)
class Case:
    """One command; words after ``python -S``. code: the status that it must end with."""

    name: str
    words: tuple[str, ...]
    plugin: bool
    env: tuple[tuple[str, str], ...] = ()
    code: int = 0
    expect: str = ""


CASES = (
    Case("show a plain app's config", ("app.py", "--cfg", "job"), False, expect="name: mysql"),
    Case("show a plain app's config", ("app.py", "--cfg", "job"), True, expect="name: mysql"),
    Case("a plain app's help", ("app.py", "--help"), False, expect="db: mysql, postgresql"),
    Case("a plain app's help", ("app.py", "--help"), True, expect="db: mysql, postgresql"),
    Case("complete db= in bash", ("app.py", *COMPLETE), False, tuple(COMPLETION.items()), expect="db=mysql"),
    Case("complete db= in bash", ("app.py", *COMPLETE), True, tuple(COMPLETION.items()), expect="db=mysql"),
    Case("show the recipe's config", ("recipe.py", "--cfg", "job"), False, expect="tp_size: 1"),
    Case("show the recipe's config", (*RECIPE, "--cfg", "job"), True, expect="tp_size: 1"),
    Case("the same, groups typed", ("typed.py", "--cfg", "job"), False, expect="tp_size: 1"),
    Case("the same, groups typed", (*RECIPE, "--cfg", "job"), True, expect="tp_size: 1"),
    Case("the recipe's help", ("recipe.py", "--help"), False, expect="strategy: ddp, fsdp2"),
    Case("the recipe's help", (*RECIPE, "--help"), True, expect="strategy: ddp, fsdp2"),
    Case("complete strategy=", ("recipe.py", *COMPLETE), False, tuple(STRATEGY_COMPLETION.items()), expect="=ddp"),
    Case("complete strategy=", (*RECIPE, *COMPLETE), True, tuple(STRATEGY_COMPLETION.items()), expect="=ddp"),
    Case(
        "refuse a combination",
        (*RECIPE, "strategy=ddp", "parallelism.tp_size=2"),
        True,
        code=1,
        expect="tp_size=2 is not possible",
    ),
)


def links(folder: Path) -> tuple[Path, Path]:
    """Two folders of links: every installed package but this one, and this one."""
    others, ours = folder / "others", folder / "ours"
    for made in (others, ours):
        (made / "hydra_plugins").mkdir(parents=True)
    spec = importlib.util.find_spec("nemo_dist_conf")
    if spec is None or spec.origin is None:
        raise SystemExit("nemo_dist_conf is not installed: pip install .")
    home = Path(spec.origin).parents[1]
    for name in ("nemo_dist_conf", "conf", "hydra_plugins/nemo_dist_conf"):
        if (home / name).is_dir():
            (ours / name).symlink_to(home / name)
    for site in (Path(entry) for entry in sys.path):
        if site.name not in ("site-packages", "dist-packages") or not site.is_dir():
            continue
        for entry in site.iterdir():
            name = entry.name
            if name == "hydra_plugins":
                for plugin in entry.iterdir():
                    if plugin.name not in ("nemo_dist_conf", "__pycache__"):
                        (others / "hydra_plugins" / plugin.name).symlink_to(plugin)
            elif name.startswith("nemo_dist_conf") and name.endswith(".dist-info"):
                (ours / name).symlink_to(entry)
            elif "nemo_dist_conf" not in name and not name.endswith(".pth") and not (others / name).exists():
                (others / name).symlink_to(entry)
    return others, ours


def plain_app(folder: Path) -> None:
    (folder / "app.py").write_text(textwrap.dedent(APP))
    for name, text in TREE.items():
        path = folder / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def plain_recipe(folder: Path) -> None:
    """The recipe's config as two apps of plain Hydra would hold it: everything in YAML, and with its groups typed."""
    from omegaconf import OmegaConf

    from nemo_dist_conf.composition.groups import config_groups
    from nemo_dist_conf.recipe.yaml_folder import config_folder

    app = textwrap.dedent(APP).replace('"conf"', '"recipe"').replace('"config"', '"train"')
    tree = folder / "recipe"
    left_out = shutil.ignore_patterns("plan.yaml", "*.py", "__pycache__", "hardware", "strategy")
    shutil.copytree(config_folder(), tree, ignore=left_out)
    root: Any = OmegaConf.to_container(OmegaConf.load(tree / "train.yaml"))
    defaults = [{group: next(iter(options))} for group, options in config_groups().items()]
    # What the recipe's own strategies change, on top of those of plain Hydra.
    (tree / "precision").mkdir()
    for file in (config_folder() / "strategy").glob("*.yaml"):
        changes: Any = OmegaConf.load(file)
        del changes["defaults"]
        (tree / "precision" / file.name).write_text(OmegaConf.to_yaml(changes))
    defaults.append({"optional precision@strategy": "${strategy}"})
    root["defaults"] = [*defaults, *root["defaults"][1:]]  # in place of the base config
    root["activation_checkpointing"] = False
    del root["hydra"]["callbacks"], root["hydra"]["help"]["footer"]
    (tree / "train.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(root)))

    (folder / "typed.py").write_text("import groups\n" + app.replace('"recipe"', '"typed"'))
    (folder / "groups.py").write_text(typed_groups())
    shutil.copytree(tree, folder / "typed")

    (folder / "recipe.py").write_text(app)
    for group, options in config_groups().items():
        (tree / group).mkdir()
        for name, make in options.items():
            node: Any = OmegaConf.to_container(OmegaConf.structured(make()), enum_to_str=True)
            node.pop("defaults", None)
            (tree / group / f"{name}.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(node)))


def run(case: Case, folder: Path, others: Path, ours: Path) -> tuple[float, float]:
    """CPU and wall seconds of the child."""
    dropped = ("PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    env.update(case.env, PYTHONPYCACHEPREFIX=str(folder / "bytecode"))
    env["PYTHONPATH"] = os.pathsep.join(map(str, (others, ours) if case.plugin else (others,)))
    command = [sys.executable, "-S", *case.words]
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        child = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if child.returncode != case.code or case.expect not in text:
        raise AssertionError(f"{shlex.join(command)} ended with {child.returncode}:\n{text}")
    return usage.ru_utime + usage.ru_stime, wall


def verify(folder: Path, others: Path, ours: Path) -> None:
    """That the plugin is seen on one side and not on the other."""
    words = ("app.py", "+strategy=ddp", "--cfg", "job")
    run(Case("", words, True, expect="bucket_cap_mb: null"), folder, others, ours)
    run(Case("", words, False, expect="strategy: ddp"), folder, others, ours)


def measure(repeats: int, warm_up: int) -> list[dict[str, Any]]:
    cpu: list[list[float]] = [[] for _ in CASES]
    wall: list[list[float]] = [[] for _ in CASES]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        others, ours = links(folder)
        plain_app(folder)
        plain_recipe(folder)
        verify(folder, others, ours)
        for number in range(warm_up + repeats):
            order = list(range(len(CASES)))
            for index in order if number % 2 else reversed(order):
                used, waited = run(CASES[index], folder, others, ours)
                if number >= warm_up:  # the first compiles and warms the file cache
                    cpu[index].append(used)
                    wall[index].append(waited)
    results = []
    plain = cpu[0]
    for index, case in enumerate(CASES):
        peer = next((i for i, c in enumerate(CASES) if c.name == case.name and not c.plugin), None)
        base = plain if peer is None else cpu[peer]
        results.append(
            {
                "case": case.name,
                "plugin": case.plugin,
                "cpu_s": statistics.median(cpu[index]),
                "wall_s": statistics.median(wall[index]),
                "ratio": statistics.median(a / b for a, b in zip(cpu[index], base, strict=True)),
                "beside": "a plain app's" if peer is None else "without the plugin",
                "all_cpu_s": cpu[index],
            }
        )
    return results


COLUMNS = ("command", "plugin", "CPU s", "wall s", "ratio", "beside", "aim")


def table(results: list[dict[str, Any]]) -> str:
    rows: list[tuple[str, ...]] = []
    for r in results:
        paired = r["plugin"] and r["beside"] == "without the plugin"
        ratio, beside = (f"{r['ratio']:.3f}", r["beside"]) if r["plugin"] else ("", "")
        plugin, aim = ("with" if r["plugin"] else "without"), (f"{AIM:.2f}" if paired else "")
        rows.append((r["case"], plugin, f"{r['cpu_s']:.3f}", f"{r['wall_s']:.3f}", ratio, beside, aim))
    return report.table(COLUMNS, rows)


def markdown(measured: dict[str, Any]) -> str:
    machine = measured["hardware"]
    return f"""# Composing with and without the plugin

CPU seconds of whole processes, medians of {measured["repeats"]} taken in turns; ratios are medians of pairs.
How it is measured stands at the top of [compose.py](../compose.py).

{table(measured["results"])}

Measured {measured["date"]} on {machine["cpu"]}, {machine["cores"]} cores, {machine["ram_gib"]} GiB; load before the run
{machine["load_before"]}. Versions: {report.used(measured)}.

    {measured["command"]}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="runs of each command (default 15)")
    parser.add_argument("--quick", action="store_true", help="one run of each: a smoke test")
    report.add_files(parser)
    options = parser.parse_args()
    repeats = 1 if options.quick else options.repeats
    measured = report.new_report(__file__, repeats=repeats)
    measured["results"] = measure(repeats, warm_up=0 if options.quick else 1)
    report.finish(measured, options, table(measured["results"]), markdown)


if __name__ == "__main__":
    main()
