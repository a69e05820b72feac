"""Peak memory of an attention call whose sequence is split over two ranks, at several lengths.

    python benchmarks/context.py --json benchmarks/results/context.json --markdown benchmarks/results/context.md

Two gloo ranks of this machine, fp32, one row, 4 heads of 32, 2 of keys and values. Each rank holds half of the row and
calls the attention function that context parallelism registers with transformers, forward and backward; the last row
is the same by hand with a mask of queries x keys for scaled_dot_product_attention.

memory  peak MB that torch's MemTracker counts on the fullest rank: queries, keys and values of the rank and their
        gradients, those gathered, outputs, masks and scores.

The run fails if output or gradients of a rule differ from those of plain attention with a mask, at the shortest length.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import report
from ranks import joined, largest, on_ranks

WORLD_SIZE = 2
HEADS, GROUPS, WIDTH = 4, 2, 32
BY_HAND = "causal, by hand with a mask"
KINDS = ("causal", "a window of 512", "chunks of 1,024", "seven packed documents", "soft cap", "sinks", BY_HAND)


def rule_of(kind: str, length: int) -> tuple[Any, dict[str, Any]]:
    """The rule, and what else the attention function is given."""
    import torch

    from nemo_dist_conf.runtime.techniques.context.mask_rules import Behind, Both, Causal, Chunks, Documents, Packed

    if kind.startswith("a window"):
        return Both((Behind(512), Causal())), {}
    if kind.startswith("chunks"):
        return Both((Chunks(1024), Causal())), {}
    if kind.startswith("seven"):
        documents = Documents.of(torch.arange(length).remainder(length // 7).unsqueeze(0))
        assert documents is not None
        return Packed(Causal(), documents), {}
    more: dict[str, dict[str, Any]] = {"soft cap": {"softcap": 5.0}, "sinks": {"s_aux": torch.linspace(-1, 1, HEADS)}}
    return Causal(), more.get(kind, {})


def dense(query: Any, key: Any, value: Any, start: int, rule: Any, more: dict[str, Any]) -> Any:
    """Plain attention [B, H, n, D] of queries from ``start`` on over all keys, with a mask and all scores at once."""
    import torch
    import torch.nn.functional as F

    places = torch.arange(start, start + query.size(2)).view(1, 1, -1, 1)
    mask = rule.seen(torch.zeros(1, 1, 1, 1, dtype=torch.int64), places, torch.arange(key.size(2)).view(1, 1, 1, -1))
    if not more:
        return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    key, value = (part.repeat_interleave(HEADS // GROUPS, 1) for part in (key, value))
    score = query @ key.mT / WIDTH**0.5
    if "softcap" in more:
        score = more["softcap"] * torch.tanh(score / more["softcap"])
    score = score.masked_fill(~mask, -torch.inf)
    if "s_aux" in more:
        score = torch.cat([score, more["s_aux"].view(1, -1, 1, 1).expand(1, -1, score.size(2), 1)], -1)
    return score.softmax(-1)[..., : key.size(2)] @ value


def measure(rank: int, folder: str, kinds: list[str], lengths: list[int]) -> None:
    import torch
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.distributed.device_mesh import init_device_mesh

    from nemo_dist_conf.runtime.techniques.context.exchange import Exchange, chunks_of, exchanged_attention
    from nemo_dist_conf.runtime.techniques.context.parallel import split_sequence

    with joined(rank, folder, WORLD_SIZE):
        mesh = init_device_mesh("cpu", (WORLD_SIZE,))
        found: dict[str, dict[str, Any]] = {}
        for kind in kinds:
            for length in lengths:
                torch.manual_seed(0)
                exchange = Exchange(mesh, lengths={length // WORLD_SIZE})
                rule, more = rule_of(kind, length)
                whole = [torch.randn(1, heads, length, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
                own = [split_sequence(part, mesh, 2).requires_grad_() for part in whole]
                query, key, value = whole

                def call() -> Any:
                    for part in own:
                        part.grad = None
                    if kind == BY_HAND:
                        keys, values = (exchange.whole(part, 2) for part in own[1:])
                        chunk, outputs = length // (2 * WORLD_SIZE), []
                        for index, part in zip(chunks_of(rank, WORLD_SIZE), own[0].chunk(2, 2)):
                            outputs.append(dense(part, keys, values, index * chunk, rule, more))
                        out = torch.cat(outputs, 2).transpose(1, 2).contiguous()
                    else:
                        q, k, v = own
                        out, _ = exchanged_attention(exchange, torch.nn.Module().eval(), q, k, v, rule, **more)
                    out.sum().backward()
                    return out.detach()

                if length == lengths[0]:
                    out = call()
                    for part in whole:
                        part.requires_grad_()
                    expected = dense(query, key, value, 0, rule, more)
                    expected.sum().backward()
                    pairs = [(out.transpose(1, 2), expected.detach())] + [(a.grad, b.grad) for a, b in zip(own, whole)]
                    for mine, all_of_it in pairs:
                        torch.testing.assert_close(mine, split_sequence(all_of_it, mesh, 2), rtol=1e-4, atol=1e-4)
                del whole
                with MemTracker() as tracker:
                    tracker.track_external(*own)
                    call()
                    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
                found.setdefault(kind, {})[str(length)] = largest(peak) / 2**20
        if rank == 0:
            Path(folder, "found.json").write_text(json.dumps(found))


def shown(found: dict[str, Any]) -> str:
    rows = []
    for result in found["results"]:
        peaks = list(result["peak_mb"].values())
        rows.append((result["kind"], *(f"{peak:.1f}" for peak in peaks), f"{peaks[-1] / peaks[-2]:.2f}"))
    titles = [f"{length:,} tokens [MB]" for length in found["lengths"]]
    return report.table(("attention", *titles, "last / one before"), rows)


def markdown(found: dict[str, Any]) -> str:
    hardware = found["hardware"]
    about = (
        "Peak memory of one call on two ranks, forward and backward: it grows with the sequence, not with its square. "
        "What is measured stands at the top of [context.py](../context.py)."
    )
    return f"""# Memory of attention under context parallelism

{about}

{shown(found)}

Measured {found["date"]} on {hardware["cpu"]}, {hardware["cores"]} cores, {hardware["ram_gib"]} GiB;
2 gloo ranks, 1 thread each, load before the run {hardware["load_before"]}.
Versions: {report.used(found)}.

    {found["command"]}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--quick", action="store_true", help="short rows, to see that it runs")
    report.add_files(parser)
    options = parser.parse_args()
    if options.quick:
        options.lengths = [256, 512]
    found = report.new_report(__file__, lengths=options.lengths)
    measured = on_ranks(WORLD_SIZE, measure, list(KINDS), options.lengths)
    found["results"] = [{"kind": kind, "peak_mb": peaks} for kind, peaks in measured.items()]
    report.finish(found, options, shown(found), markdown)


if __name__ == "__main__":
    main()
