"""Invalid and doubtful configurations: what each side does with them, and when.

    python benchmarks/bad_input.py --environments .peers --json benchmarks/results/bad_input.json \\
        --markdown benchmarks/results/bad_input.md

Ours is the recipe's own command line, with as many ranks as the case says; hand-written torch, Accelerate and Fabric
are asked the same where their interface can say it, on as many ranks of torchrun, each in its environment (peers/ says
how those are made; without --environments in this one). Cases and code stand in bad_cases.py.

refused   ended with an error, before torch was imported or a rank was started
error     ended with an error in its ranks: while it was wrapped, or in the first step
warned    made a step, and said something about what was asked
runs      made a step without a word
hangs     did neither in a minute

helps     the error names what was asked, what is allowed and what to type instead (ours), or holds a word of what was
          asked (the others)
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

import report  # noqa: E402  (found through the line above)
from bad_cases import CASES, Case  # noqa: E402

TIMEOUT_S = 60
#: side -> (title, environment of peers/, what has to be installed)
OTHERS = {
    "hand": ("torch by hand", "hand", "torch"),
    "accelerate": ("Accelerate", "accelerate", "accelerate"),
    "fabric": ("Fabric", "fabric", "lightning_fabric"),
}
#: The smoke test's cases: one of each outcome.
QUICK = ("a misspelt option of sharding", "pipeline stages under ddp", "sharding on a CPU")
_STEP = ("train.steps=1", "train.global_batch_size=4", "data.seq_len=32")


def _run(command: list[str], folder: str) -> tuple[int | None, str, str]:
    """(exit status or None for a hang, stdout, stderr) of a command and all it starts."""
    dropped = ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    env["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=err)
        status: int | None
        try:
            status = process.wait(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            # torchrun's ranks are in sessions of their own, so no signal to a group reaches them.
            for pid in reversed([process.pid, *_descendants(process.pid)]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            status = None
        out.seek(0)
        err.seek(0)
        return status, out.read(), err.read()


def _descendants(pid: int) -> list[int]:
    files = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for path in files for child in path.read_text().split()]
    return [found for child in children for found in (child, *_descendants(child))]


def ours(case: Case, folder: str) -> dict[str, Any]:
    words = shlex.split(case.words)
    if case.doubtful:
        words += _STEP
    if case.ranks > 1:
        words = ["-m", "hydra/launcher=torchrun", f"hydra.launcher.nproc_per_node={case.ranks}", *words]
    status, out, err = _run([sys.executable, "-X", "importtime", "-m", "nemo_dist_conf.train", *words], folder)
    imports = [line for line in err.splitlines() if line.startswith("import time:")]
    text = "\n".join(line for line in err.splitlines() if not line.startswith("import time:")) + out
    has_torch = any(line.rpartition("|")[2].strip() == "torch" for line in imports)
    if status is None:
        outcome = "hangs"
    elif status:
        outcome = "error" if has_torch or "Traceback" in text else "refused"
    else:
        outcome = "warned" if "warning" in text.lower() else "runs"
    helps = bool(status) and _helps(text, case)
    return {"outcome": outcome, "helps": helps, "message": "" if outcome == "runs" else _shown(text)}


def _helps(text: str, case: Case) -> bool:
    """Whether it says what was asked, what is allowed and what to type, in our words or in Hydra's."""
    if re.search(r"^ *asked ", text, re.M):
        return all(re.search(rf"^ *{word} ", text, re.M) for word in ("asked", "allowed", "type"))
    typed = [word.lstrip("+").partition("=")[0] for word in shlex.split(case.words)]
    return any(key in text or key.rpartition(".")[2] in text for key in typed)


def _shown(text: str) -> str:
    """The line that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    at = next((index for index, line in enumerate(lines) if line.startswith("asked ")), None)
    if at:
        return lines[at - 1]
    told = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b|.*WARNING|Could not|Key |In '", line)]
    shown = (told or lines or [""])[0 if not told else -1]
    return re.sub(r"^\[\d.*?\[WARNING\] - |^\d+\. ", "", shown)


def other(side: str, case: Case, python: str, folder: str) -> dict[str, Any]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
    code = case.others[side]
    status, out, err = _run([python, *launch, str(HERE / "bad_rank.py"), side, code], folder)
    lines = [re.sub(r"^\[rank\d+\]: ", "", line) for line in err.splitlines()]
    error = next((line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)), "")
    reached = "the step" if "wrapped" in out else "wrapping" if "asked" in out else "imports"
    warning = next((line for line in lines if re.search(r"\b\w*Warning: ", line)), "")
    if status is None:
        outcome = "hangs"
    elif status:
        outcome = f"error in {reached}"
    else:
        outcome = "warned" if warning else "runs"
    share = re.search(r"step ([\d.]+)", out)
    message = error or warning.partition("Warning: ")[2]
    asked = set(re.findall(r"[A-Za-z_]{4,}(?==)|'([\w.]+)'", code)) | set(re.findall(r"(\w{4,})=", code))
    return {
        "outcome": outcome,
        "helps": bool(status) and any(word and word in error for word in asked),
        "message": message,
        "held": float(share[1]) if share else None,
        "code": code,
    }


def table(results: list[dict[str, Any]]) -> str:
    sides = [side for side in OTHERS if any(side in result["others"] for result in results)]
    columns = ("asked for", "ranks", "nemo_dist_conf", *(OTHERS[side][0] for side in sides))
    rows = []
    for result in results:
        cells = [_cell(result["ours"])]
        cells += [_cell(result["others"][side]) if side in result["others"] else "" for side in sides]
        rows.append((result["intent"], str(result["ranks"]), *cells))
    return report.table(columns, rows)


def _cell(found: dict[str, Any]) -> str:
    held = found.get("held")
    rest = "" if held is None else f" (a rank holds {held:.0%})"
    return f"{found['outcome']}{rest}{', helps' if found['helps'] else ''}"


def summary(results: list[dict[str, Any]]) -> str:
    """How many cases end how, side by side."""
    rows = []
    for side, title in (("ours", "nemo_dist_conf"), *((name, entry[0]) for name, entry in OTHERS.items())):
        found = [r["ours"] if side == "ours" else r["others"].get(side) for r in results if not r["doubtful"]]
        known = [one for one in found if one is not None]
        kinds = ("refused", "error", "warned", "runs", "hangs")
        counts = [sum(one["outcome"].startswith(kind) for one in known) for kind in kinds]
        rows.append((title, str(len(known)), *map(str, counts), str(sum(one["helps"] for one in known))))
    return report.table(("side", "invalid", "refused", "error", "warned", "runs", "hangs", "helps"), rows)


def markdown(measured: dict[str, Any]) -> str:
    details = []
    for result in measured["results"]:
        details.append(f"- **{result['intent']}** (`{result['words']}`): {_quoted(result['ours'])}")
        details += [f"  - {OTHERS[side][0]}: {_quoted(found)}" for side, found in result["others"].items()]
    what = (__doc__ or "").split("\n\n")
    return f"""# Invalid and doubtful configurations

{what[2]}

    {what[3].replace(chr(10), chr(10) + "    ")}

{what[4]}

{summary(measured["results"])}

{table(measured["results"])}

## What is said

{chr(10).join(details)}

Run {measured["date"]}; {report.used(measured)}; the peers' versions stand in [environments](../peers/environments).

    {measured["command"]}
"""


def _quoted(found: dict[str, Any]) -> str:
    message = found["message"][:200].replace("`", "'")
    return f"{found['outcome']}" + (f": `{message}`" if message else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, help="folder of the peers' environments (default: this one)")
    parser.add_argument("--only-ours", action="store_true", help="leave the others out")
    parser.add_argument("--quick", action="store_true", help="three cases, each side in one of them: a smoke test")
    report.add_files(parser)
    options = parser.parse_args()
    pythons = {}
    for side, (_, environment, package) in OTHERS.items() if not options.only_ours else ():
        if options.environments is not None:
            pythons[side] = str(options.environments.resolve() / environment / "bin" / "python")
            if not Path(pythons[side]).exists():
                raise SystemExit(f"{pythons[side]}: benchmarks/peers --environments makes it")
        elif importlib.util.find_spec(package):
            pythons[side] = sys.executable
    measured = report.new_report(__file__)
    tried: set[str] = set()
    for case in CASES:
        if options.quick and case.intent not in QUICK:
            continue
        with tempfile.TemporaryDirectory() as folder:
            result: dict[str, Any] = {"intent": case.intent, "ranks": case.ranks, "words": case.words}
            result["doubtful"], result["ours"] = case.doubtful, ours(case, folder)
            result["others"] = {
                side: other(side, case, pythons[side], folder)
                for side in case.others
                if side in pythons and not (options.quick and side in tried)
            }
            tried |= set(case.others)
        measured["results"].append(result)
        print(f"{case.intent}: {_cell(result['ours'])}", file=sys.stderr, flush=True)
    report.finish(measured, options, f"{table(measured['results'])}\n\n{summary(measured['results'])}", markdown)


if __name__ == "__main__":
    main()
