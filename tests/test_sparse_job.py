"""Magnitude, SET and RigL through the main job: options, a run folder, and a run that was killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_job import outcome

from compressor import job
from compressor.errors import BudgetError, InputError, UnknownNameError
from compressor.job import Settings

SHORT = {"model": "user_models:tiny", "epochs": 3, "prune-every": 9, "sparsity": 0.8}


def settings_of(criterion: str, granularity: str, folder: Path, **more: object) -> Settings:
    rounded = {"round-to": 4} if granularity == "channel" else {}
    return Settings.from_options(
        {**SHORT, **rounded, "criterion": criterion, "granularity": granularity, "out": str(folder), **more}
    )


@pytest.mark.parametrize(
    ("criterion", "granularity"), [("rigl", "weight"), ("set", "channel"), ("magnitude", "channel")]
)
def test_a_killed_run_goes_on_bit_for_bit(criterion: str, granularity: str, tmp_path: Path, monkeypatch) -> None:
    whole = outcome(settings_of(criterion, granularity, tmp_path / "whole"), monkeypatch)
    kills = [("pruned", 20), ("pruned", 45)]
    killed = outcome(settings_of(criterion, granularity, tmp_path / "killed"), monkeypatch, *kills)
    assert killed[0] == whole[0]
    for there, here in zip(killed[1:], whole[1:], strict=True):
        assert there.keys() == here.keys()
        assert all(torch.equal(there[name], here[name]) for name in here)


def test_single_weights_are_zeros_and_the_report_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("compressor.job.main_job.finish", lambda settings, data, trained, *rest: trained)
    trained = job.run(settings_of("rigl", "weight", tmp_path / "run"))
    weights = [p for name, p in trained.pruned.named_parameters() if p.dim() > 1]
    zeros = sum(int((p == 0).sum()) for p in weights)
    assert trained.result.measure == "weights"
    assert trained.result.reached
    assert zeros / sum(p.numel() for p in weights) == pytest.approx(0.8, abs=0.002)
    assert "ended without a weight and are cut" in trained.result.notes[0]


def test_channels_make_the_model_smaller(tmp_path: Path) -> None:
    made = job.run(settings_of("rigl", "channel", tmp_path / "run", allocate="uniform", measure="macs"))
    assert made.goal.measure == "macs"
    assert made.goal.reached >= 0.8
    assert made.pruned.macs == made.pruned.fvcore_macs
    assert all(layer.after % 4 == 0 for layer in made.layers)
    assert [cut.stage for cut in made.cuts] == ["pruned"]


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"cannot remove 99\.0% of the params"):
        job.run(settings_of("set", "channel", tmp_path / "run", sparsity=0.99))
    with pytest.raises(InputError, match=r"rigl changes its masks every 50 steps until 75% of 54"):
        job.run(settings_of("rigl", "weight", tmp_path / "run", **{"prune-every": 50}))
    assert not (tmp_path / "run").exists()


def test_options_that_are_left_open_are_as_published() -> None:
    for criterion, allocation in (("magnitude", "uniform"), ("set", "erk"), ("rigl", "erk")):
        settings = Settings(criterion=criterion)
        assert (settings.when, settings.granularity, settings.allocate) == ("during", "weight", allocation)
        assert Settings.from_options(settings.given()) == settings
    assert Settings(criterion="l1").granularity is None


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"criterion": "rigel"}, UnknownNameError, "unknown criterion 'rigel': did you mean 'rigl'"),
        ({"criterion": "rigl", "granularity": "filter"}, UnknownNameError, "unknown granularity 'filter'"),
        ({"criterion": "rigl", "allocate": "erc"}, UnknownNameError, "unknown allocation 'erc': did you mean 'erk'"),
        ({"criterion": "rigl", "when": "after"}, InputError, "--criterion rigl changes its masks in training"),
        ({"criterion": "rigl", "allocate": "global"}, InputError, "rigl begins at random, so there is nothing to rank"),
        ({"criterion": "rigl", "allocate": "relevance"}, UnknownNameError, "unknown allocation 'relevance'"),
        ({"criterion": "set", "round-to": 4}, InputError, "--round-to has no effect with --granularity weight"),
        ({"criterion": "set", "measure": "macs"}, InputError, "--measure has no effect with --granularity weight"),
        ({"criterion": "set", "confidence": 0.9}, InputError, "--confidence has no effect with --criterion set"),
        ({"criterion": "l1", "granularity": "weight"}, InputError, "--granularity has no effect with --criterion l1"),
        ({"allocate": "erk"}, UnknownNameError, "unknown allocation 'erk': known: global, relevance, uniform"),
    ],
)
def test_options_that_cannot_be_used_are_refused(given: dict, error: type, message: str) -> None:
    with pytest.raises(error) as caught:
        Settings.from_options(given)
    assert str(caught.value).startswith(message)
