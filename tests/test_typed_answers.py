"""What a refusal offers leads on when it is typed: the same problem is gone, and the end is a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_lines import COMMAND_LINES
from tests.typed_answers import APPS, Line, bad_lines, findings

pytestmark = pytest.mark.slow

#: All of them: python -m tests.typed_answers.
LINES = bad_lines()
#: Lines of one app after the other, and each offer that is met again is known by then.
CHUNKS = 12


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_what_is_offered_leads_to_a_run(chunk: int) -> None:
    chosen = LINES[::3]
    size = -(-len(chosen) // CHUNKS)
    assert [finding for line in chosen[chunk * size : (chunk + 1) * size] for finding in findings(line)] == []


def test_every_line_of_the_golden_file_leads_to_a_run() -> None:
    assert [finding for ranks, words in COMMAND_LINES for finding in findings(Line.of(ranks, words))] == []


def test_what_a_folder_says_is_not_offered_to_be_typed(tmp_path: Path) -> None:
    family, field = "mixtral", "output_router_logits"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, field: True}))
    line = Line.of(2, f"model.name_or_path={tmp_path} parallelism.pp_size=2")
    text, error = line.outcome()
    assert error is not None and field not in error.type, text
    assert findings(line) == []


@pytest.mark.parametrize(
    "words",
    [
        "strategy=ddp strategy.bucket_cap_mb=inf",
        "optimizer.fused=true optimizer.foreach=true",
        "seed=99999999999999999999",
        "+model.hidden_size=64",
        "model=mixtral_tiny model.config.num_experts_per_tok=100",
        "+model.config.attention_dropout=2",
        "'seed=${oc.env:NOT_SET}'",
        "'train={steps:${nothing.there}}'",
        "'parallelism.tp_size=${oc.env:NOT_SET}'",
        "'activation_checkpointing=${nothing.there}'",
    ],
)
def test_what_would_end_in_a_traceback_is_refused(words: str) -> None:
    line = Line.of(1, words)
    text, error = line.outcome()
    assert error is not None, text
    assert findings(line) == []


def test_a_plan_that_is_offered_is_known_to_fit() -> None:
    """Of tensor parallelism: one matrix alone is split where the code beside it takes the whole."""
    entries = ("gate_proj:colwise", "up_proj:colwise", "down_proj:rowwise")
    mlp = ",".join(f"model.layers.*.mlp.{entry}" for entry in entries)
    for plan, offered in {
        "{a:colwise}": "strategy.tp_plan=null",
        "{model.layers.9.mlp.up_proj:colwise}": "strategy.tp_plan=null",
        f"{{{mlp.replace('up_proj', 'up_prj')}}}": f"'strategy.tp_plan={{{mlp}}}'",
    }.items():
        line = Line.of(2, f"parallelism.tp_size=2 'strategy.tp_plan={plan}'")
        error = line.outcome()[1]
        assert error is not None and error.type == offered
        assert findings(line) == []


def test_there_are_hundreds_of_every_kind() -> None:
    refused = [line for line in LINES[::5] if line.outcome()[1] is not None]
    assert len(LINES) > 700 and len(refused) > 0.8 * len(LINES[::5])
    assert {line.program for line in LINES} == {"recipe", *APPS}


def test_an_offer_that_leads_nowhere_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_dist_conf.errors import ConfigError, Problem

    def circle(self: Line) -> tuple[str, ConfigError | None]:
        other = "train.steps=2" if "train.steps=1" in self.words else "train.steps=1"
        return "refused", ConfigError(
            Problem(what=f"not {self.words}", asked=self.words[0], allowed="other steps", instead=other)
        )

    monkeypatch.setattr(Line, "outcome", circle)
    (found,) = findings(Line.of(1, "train.steps=1"))
    assert "comes back to" in found


def test_an_offer_after_which_nothing_has_changed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_dist_conf.errors import ConfigError, Problem

    def still(self: Line) -> tuple[str, ConfigError | None]:
        return "refused", ConfigError(
            Problem(what="no", asked=self.words[0], allowed="others", instead=f"{self.words[0]}0")
        )

    monkeypatch.setattr(Line, "outcome", still)
    assert any("still so" in found for found in findings(Line.of(1, "train.steps=1")))
