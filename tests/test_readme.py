"""What the README and the landing page say is what was measured."""

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
POCKET = json.loads((ROOT / "book/results/pocket.json").read_text(encoding="utf-8"))


def test_the_curve_and_its_numbers():
    last = POCKET["val_loss"][-1][1]
    assert last / POCKET["floor"] < 1.10
    for text in (README, (ROOT / "book/index.md").read_text(encoding="utf-8")):
        assert f"{last:.3f}" in text and f"{POCKET['floor']:.3f}" in text
        assert "_static/pocket-curve.png" in text


def test_the_sample_is_one_that_was_drawn():
    quoted = " ".join(line[2:] for line in README.splitlines() if line.startswith("> "))
    assert quoted in POCKET["samples"]


def test_the_measured_run_is_the_preset_as_it_is():
    from dataclasses import asdict

    from nanolm.model import ModelConfig
    from nanolm.train import TrainConfig

    assert POCKET["config"]["model"] == asdict(ModelConfig.preset("pocket"))
    now = json.loads(json.dumps(asdict(TrainConfig.preset("pocket"))))
    measured = POCKET["config"]["train"]
    assert measured == {name: now[name] for name in measured}
    younger = {"graph", "deterministic", "on_nan", "tensorboard", "wandb"}  # of no account there
    assert now.keys() - measured.keys() <= younger


def test_the_english_run():
    run = json.loads((ROOT / "book/results/run04-h200.json").read_text(encoding="utf-8"))
    train = run["config"]["train"]
    tokens = train["steps"] * train["batch_size"] * run["config"]["model"]["max_seq_len"]
    assert tokens // 10**6 == 655 and "655 million tokens" in README
    rates = run["tokens_per_second"]
    assert 5.775e6 < statistics.median(rates) < 5.785e6 and "5.78 million tokens a second" in README
    assert round(run["wall_seconds"]) == 133 and "133 seconds" in README


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 12 and "@@" not in README
    for link in links:
        assert (ROOT / link).exists(), link
