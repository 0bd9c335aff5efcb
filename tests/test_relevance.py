"""Relevance against enumeration and planted truths; and what a training loop may rely on."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
from test_after_training import Planted
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor.errors import InputError, RangeError, UnknownNameError
from compressor.graph import ChannelGraph, ConsumerInput, Group, Member
from compressor.relevance import RelevanceConfig
from compressor.relevance.draws import independent_draws, stratified_draws
from compressor.relevance.estimators import ESTIMATORS, BatchRecord, Estimator
from compressor.relevance.evidence import Evidence
from compressor.relevance.gates import Gates
from compressor.relevance.relevance import Relevance
from compressor.relevance.statistics import ControlVariate, RunningMean

NAMES = list(ESTIMATORS)


def squared_error(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    losses = (outputs - targets).square().flatten(1).sum(1)
    return losses if reduction == "none" else losses.mean()


def small(noise: float = 0.0) -> tuple[nn.Module, Tensor, Tensor]:
    """The 2-4-1 network: small enough to try every subset of its hidden channels; it fits all but the noise."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(240, 2, generator=generator, dtype=torch.float64)
    y = model(x).detach()
    return model, x, y + noise * torch.randn(y.shape, generator=generator, dtype=y.dtype)


def digits_like(samples: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images whose class is the quarter in which they are bright."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(samples) % 4
    x = torch.randn(samples, 1, 8, 8, generator=generator)
    for image, quarter in zip(x, targets.tolist(), strict=True):
        image[0, 4 * (quarter // 2) :, 4 * (quarter % 2) :][:4, :4] += 1.5
    return x, targets


def convolutional() -> nn.Module:
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 4))


def watching(estimator: str = "soft", **settings: object) -> tuple[nn.Module, Relevance]:
    model = convolutional().train()
    return model, watcher(compressor.trace(model, digits_like(2)[0]), estimator=estimator, **settings)


def watcher(graph: compressor.ChannelGraph, estimator: str = "soft", seed: int = 0, **settings: object) -> Relevance:
    return Relevance(graph, RelevanceConfig(estimator, **{"observe_every": 1, **settings}), seed=seed)


def observe(model: nn.Module, relevance: Relevance, steps: int, first: int = 0, batch: int = 64) -> None:
    for step in range(first, first + steps):
        relevance.loss(model, *digits_like(batch, seed=step), F.cross_entropy).backward()
        relevance.step()


# -- enumeration


def losses_without(model: nn.Module, x: Tensor, y: Tensor, gate: Tensor, mean: bool) -> Tensor:
    """The mean loss with hidden channels gated, by hand."""
    h = model[1](model[0](x))
    centre = h.mean(0) if mean else 0.0
    return squared_error(model[2](centre + gate * (h - centre)), y)


def semivalue(model: nn.Module, x: Tensor, y: Tensor, channel: int) -> float:
    """Loss out minus loss in, over all subsets of the other channels, each in or out with equal chance."""
    total = 0.0
    for others in itertools.product([0.0, 1.0], repeat=3):
        gate = torch.tensor([*others[:channel], 0.0, *others[channel:]], dtype=torch.float64)
        out = losses_without(model, x, y, gate, mean=True)
        gate[channel] = 1.0
        total += float(out - losses_without(model, x, y, gate, mean=True)) / 8
    return total


def soft_effect(model: nn.Module, x: Tensor, y: Tensor, channel: int, partners: list[int]) -> float:
    """Loss out minus loss in, averaged over one partner drawn along, whose gate is uniform (Simpson: exact here)."""
    effects = []
    for partner in partners:
        for at, weight in ((0.0, 1 / 6), (0.5, 4 / 6), (1.0, 1 / 6)):
            gate = torch.ones(4, dtype=torch.float64)
            gate[partner], gate[channel] = at, 0.0
            out = losses_without(model, x, y, gate, mean=False)
            gate[channel] = 1.0
            effects.append(weight * float(out - losses_without(model, x, y, gate, mean=False)))
    return sum(effects) / len(partners)


def binomial_effect(model: nn.Module, x: Tensor, y: Tensor, channel: int, p: float) -> float:
    """Loss out minus loss in, where every other channel is drawn with chance `p`, its gate uniform."""
    total = 0.0
    for others in itertools.product([(1.0, 1 - p), (0.0, p / 6), (0.5, 4 * p / 6), (1.0, p / 6)], repeat=3):
        at = [gate for gate, _ in others]
        gate = torch.tensor([*at[:channel], 0.0, *at[channel:]], dtype=torch.float64)
        out = losses_without(model, x, y, gate, mean=False)
        gate[channel] = 1.0
        effect = float(out - losses_without(model, x, y, gate, mean=False))
        total += effect * math.prod(weight for _, weight in others)
    return total


def shown(
    estimator: str, drop: float, steps: int, seed: int, controlled: bool = False, noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """What an estimator says in every step on the 2-4-1 network, `(steps, 4 or 4 + D)`, in units of the loss."""
    model, x, y = small(noise)
    relevance = watcher(compressor.trace(model.train(), x[:2]), estimator=estimator, drop=drop, seed=seed)
    control, factor, seen = ControlVariate(), RunningMean(4), []
    for step in range(steps):
        with relevance.observe(len(x)) as observation:
            losses = squared_error(model(x), y, reduction="none")
            observation.credit(losses)
        losses.mean().backward()
        gradients = observation.gradients() if ESTIMATORS[estimator].soft else observation.gates
        losses, left = losses.detach(), torch.tensor(1.0)
        if controlled:
            losses, left = control.reduce(losses, squared_error(model(x), y, reduction="none").detach())
        gates = observation.gates.detach()
        what = BatchRecord(
            losses, left, controlled, losses.mean() * 0, observation.draw, gates, gradients, factor.mean()
        )
        seen.append(ESTIMATORS[estimator].measure(what))
        if learn := ESTIMATORS[estimator].learn:
            factor.add(step, learn(what))
    return torch.stack([each.totals for each in seen]), torch.stack([each.weights for each in seen])


def estimated(estimator: str, drop: float, steps: int, seed: int, **how: object) -> Tensor:
    """What an estimator measures in all steps together, `(4,)` or `(4 + D,)`."""
    totals, weights = shown(estimator, drop, steps, seed, **how)
    return totals.sum(0) / weights.sum(0)


def meets(runs: Tensor, expected: list[float] | Tensor, precision: float) -> None:
    """Hold the mean of runs within three standard errors of the truth, and those below a share of the largest truth."""
    error = runs.std(0) / math.sqrt(len(runs))
    expected = torch.as_tensor(expected)
    assert float(((runs.mean(0) - expected) / error).abs().max()) < 3
    assert float(error.max()) < precision * float(expected.max())


@pytest.mark.parametrize(("drop", "drawn_along"), [(0.25, 0), (0.5, 1)])
def test_soft_meets_the_enumerated_effect_without_bias(drop: float, drawn_along: int) -> None:
    """Also where the network fits perfectly, so that every gate gradient at 1 is zero."""
    model, x, y = small()
    graph = compressor.trace(model.train(), x[:2])
    ones = torch.ones(len(x), 4, dtype=torch.float64, requires_grad=True)
    with Gates(graph).applied(ones):
        squared_error(model(x), y).backward()
    assert float(ones.grad.abs().max()) == 0.0

    runs = torch.stack([estimated("soft", drop, steps=20, seed=seed) for seed in range(10)])
    with torch.no_grad():
        others = [[o for o in range(4) if o != c] if drawn_along else [c] for c in range(4)]
        meets(runs, [soft_effect(model, x, y, c, others[c]) for c in range(4)], 0.02)


@pytest.mark.parametrize("controlled", [False, True])
def test_mixed_meets_the_enumerated_effect_without_bias(controlled: bool) -> None:
    runs = torch.stack([estimated("mixed", 0.5, 20, seed, controlled=controlled, noise=1.0) for seed in range(10)])
    model, x, y = small(1.0)
    with torch.no_grad():
        meets(runs, [binomial_effect(model, x, y, channel, 0.5) for channel in range(4)], 0.2)


@pytest.mark.parametrize("controlled", [False, True])
def test_losses_meet_the_enumerated_semivalue_without_bias(controlled: bool) -> None:
    noise = 1.0 if controlled else 0.0
    runs = torch.stack([estimated("loss", 0.5, 60, seed, controlled=controlled, noise=noise) for seed in range(10)])
    runs = runs[:, :4] - runs[:, 4:].mean(1, keepdim=True)
    model, x, y = small(noise)
    with torch.no_grad():
        meets(runs, [semivalue(model, x, y, channel) for channel in range(4)], 0.04)


def spread(estimator: str, **how: object) -> Tensor:
    """The variance of what single steps say, after the first ones, `(4,)`."""
    totals, weights = shown(estimator, 0.5, 120, 0, **how)
    return (totals / weights)[20:, :4].var(0)


def test_losses_take_variance_from_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a control variate more, where it makes the losses resolve more."""
    mixed = [spread("mixed"), spread("mixed", noise=2.0), spread("mixed", noise=2.0, controlled=True)]
    uncorrected = Estimator(ESTIMATORS["soft"].measure, draw=independent_draws, soft=True)
    monkeypatch.setitem(ESTIMATORS, "mixed", uncorrected)
    assert float((mixed[0] / spread("mixed")).max()) < 0.95
    assert float((mixed[1] / spread("mixed", noise=2.0)).max()) < 1.1
    assert float((mixed[2] / mixed[1]).min()) < 0.8


def test_the_control_variate_takes_noise_from_the_losses() -> None:
    assert float((spread("loss", controlled=True, noise=2.0) / spread("loss", noise=2.0)).max()) < 0.1


# -- planted truths


def judged() -> ChannelGraph:
    """Four channels that reach the output at once: two useful, one harmful, one disconnected."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False)).train()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[1].weight.copy_(torch.tensor([[1.0, 1.0, 0.7, 0.0]]))
    rows = torch.arange(4).unsqueeze(1)
    members = (Member("0.weight", 0, rows, "producer"), Member("1.weight", 1, rows, "consumer"))
    group = Group("0", 4, members, (ConsumerInput("1.weight", -1, rows),))
    return ChannelGraph(model, torch.zeros(1, 4), (group,), ())


@pytest.mark.parametrize(
    ("estimator", "steps"), [("soft", 60), ("gate", 60), ("mixed", 60), ("loss", 150), ("source", 3000)]
)
def test_useful_is_above_zero_and_harmful_below(estimator: str, steps: int) -> None:
    graph, generator = judged(), torch.Generator().manual_seed(0)
    relevance = watcher(graph, estimator=estimator, drop=0.25, half_life=1e9)
    for _ in range(steps):
        x = torch.randn(64, 4, generator=generator)
        relevance.loss(graph.model, x, x[:, :2].sum(1, keepdim=True), squared_error).backward()
        relevance.step()
    p = relevance.confidence()["0"]
    assert (p[:2] > 0.99).tolist() == [True, True]
    assert float(p[2]) < 0.01
    assert 0.01 < float(p[3]) < 0.99
    scores = relevance.scores()["0"]
    if estimator == "gate":
        assert float(scores[3]) == 0.0
    else:
        assert (scores[:3] > 0).tolist() == [True, True, False]
        assert int((scores - scores[3]).abs().argmin()) == 3


def test_equally_useful_channels_are_useful_although_their_losses_do_not_differ() -> None:
    """Whoever is out, equally many are: only the dummies, drawn along, show what every channel saves."""
    rows = torch.arange(64).unsqueeze(1)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 1, bias=False)).train()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(64))
        model[1].weight.fill_(1.0)
    members = (Member("0.weight", 0, rows, "producer"), Member("1.weight", 1, rows, "consumer"))
    graph = ChannelGraph(
        model, torch.zeros(1, 64), (Group("0", 64, members, (ConsumerInput("1.weight", -1, rows),)),), ()
    )
    relevance = watcher(graph, estimator="loss", drop=0.5, dummies=10, half_life=1e9)
    for _ in range(100):
        x = torch.randn(64, 64)
        relevance.loss(model, x, x.sum(1, keepdim=True), squared_error).backward()
        relevance.step()
    contrast = torch.tensor(relevance.record()["0"]["r"])
    assert 0 < 2 * float(contrast.mean()) < float(relevance.scores()["0"].mean())


@pytest.mark.parametrize("estimator", NAMES)
def test_the_level_of_the_loss_does_not_matter(estimator: str) -> None:
    found = []
    for level in (0.0, 50.0):
        graph = judged()
        relevance = watcher(graph, estimator=estimator)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            x = torch.randn(32, 4, generator=generator)
            y = x[:, :2].sum(1, keepdim=True)
            relevance.loss(
                graph.model, x, y, lambda o, t, reduction="mean", up=level: squared_error(o, t, reduction) + up
            ).backward()
            relevance.step()
        found.append(relevance.scores()["0"])
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-3)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A small network, trained, of whose channels every second was made useless afterwards."""
    torch.manual_seed(0)
    model = convolutional().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(60):
        F.cross_entropy(model(digits_like(64, seed=step)[0]), digits_like(64, seed=step)[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model[3].weight[:, 1::2] = 0.0  # disconnected from all that follows
        noise = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(9))
        model[3].weight[1::2] = noise  # these see noise and pass it on a little
        model[8].weight.view(4, 16, 4)[:, 1::2] *= 0.02
    return model


@pytest.mark.parametrize(("estimator", "steps"), [("soft", 40), ("gate", 20), ("mixed", 40), ("loss", 150)])
def test_useless_channels_rank_lowest(trained: nn.Module, estimator: str, steps: int) -> None:
    model = copy.deepcopy(trained)
    relevance = watcher(compressor.trace(model, digits_like(2)[0]), estimator=estimator, half_life=1e9)
    observe(model, relevance, steps)
    scores = relevance.scores()
    for name, size in (("0", 8), ("3", 16)):
        lowest = set(scores[name].argsort()[: size // 2].tolist())
        hits = len(lowest & set(range(1, size, 2))) / (size // 2)
        assert hits >= 0.75
    assert min(relevance.reliability().values()) > 0.3


@pytest.mark.parametrize(("estimator", "steps"), [("gate", 40), ("soft", 60), ("loss", 300)])
def test_what_the_others_predict_is_worth_nothing_where_it_is_excluded_so(estimator: str, steps: int) -> None:
    """Of `Planted`: 5 copies 0, 6 is 1 + 2, 7 is read by nobody; 3 and 4 alone say what nobody else does."""
    found = {}
    for exclude in ("linear", "zero"):
        model = Planted().float().train()
        with torch.no_grad():
            model.read.weight.mul_(24)  # loud, so that few steps tell
        relevance = watcher(
            compressor.trace(model, torch.zeros(2, 3, 6, 6)), estimator=estimator, exclude=exclude, half_life=1e9,
            drop=0.2,
        )  # fmt: skip
        for step in range(steps):
            x = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(step))
            relevance.loss(model, x, model(x).argmax(1), F.cross_entropy).backward()
            relevance.step()
        found[exclude] = relevance.scores()["write"].abs()
    assert found["linear"][[0, 1, 2, 5, 6, 7]].sum() < 0.1 * found["zero"][[0, 1, 2, 5, 6, 7]].sum()
    assert found["linear"][[3, 4]].sum() > 0.4 * found["zero"][[3, 4]].sum()


def test_what_is_known_of_predictions_survives_a_checkpoint_and_a_cut() -> None:
    def go_on(model: nn.Module, relevance: Relevance) -> dict[str, Tensor]:
        keep = {"0": torch.tensor([0, 2, 3, 5]), "3": torch.arange(12)}
        compressor.cut(relevance.graph, keep)
        relevance.narrow(keep, relevance.graph)
        observe(model, relevance, 4, first=6)
        return relevance.scores()

    model, relevance = watching("gate", exclude="linear", half_life=5.0)
    observe(model, relevance, 6)
    again, other = watching("gate", exclude="linear", half_life=5.0)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(relevance.state_dict()))
    there, here = go_on(again, other), go_on(model, relevance)
    assert all(torch.equal(there[name], here[name]) for name in here)
    assert here["0"].shape == (4,)


def test_without_any_effect_few_channels_pass() -> None:
    """End to end: losses that know nothing of the gates."""
    passed, seen = 0, 0
    for seed in range(4):
        model, relevance = watching("loss", seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(30):
            with relevance.observe(32) as observation:
                model(digits_like(32)[0])
                observation.credit(torch.randn(32, generator=generator))
            relevance.step()
        p = torch.cat(list(relevance.confidence().values()))
        passed, seen = passed + int((p > 0.99).sum()), seen + len(p)
    assert (seen, passed <= 5) == (96, True)


def test_hard_scores_are_effects_although_who_is_not_drawn_is_replaced_by_another() -> None:
    """Additive losses: among 4 channels and 10 dummies the distance from the dummies is 14/13 times the effect."""
    dice, effects = torch.Generator().manual_seed(0), torch.tensor([1.0, 0.5, 0.0, -0.5])
    evidence = Evidence(ESTIMATORS["loss"], torch.zeros(4, dtype=torch.int64), 10)
    one, none = torch.tensor(1.0), torch.zeros(70, 4)
    for step in range(1500):
        draw = stratified_draws(torch.zeros(14, dtype=torch.int64), 2, 70, dice)
        losses = draw[:, :4].float() @ effects
        evidence.add(step, BatchRecord(losses, one, False, one, draw, none, none, none[0]), 1.0, dice)
    assert evidence.ranking() == pytest.approx(effects, abs=0.02)
    distance = evidence.relevance() - evidence.dummies().mean(0)
    assert distance == pytest.approx(effects * 14 / 13, abs=0.02)


# -- who is drawn, and how often


def test_the_share_rises_in_the_warm_up() -> None:
    model, relevance = watching(drop=0.5, warmup=4)
    shares = []
    for step in range(6):
        with relevance.observe(400) as observation:
            pass
        shares.append(float(observation.draw.float().mean()))
        observe(model, relevance, 1, first=step)
    assert shares[0] == 0.0
    assert shares == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5, 0.5], abs=0.03)


@pytest.mark.parametrize("estimator", NAMES)
def test_on_one_step_in_so_many_samples_draw_and_the_others_train_as_they_would(estimator: str) -> None:
    model, relevance = watching(estimator, observe_every=3, drop=0.5)
    gated = []
    for step in range(7):
        x, y = digits_like(seed=step)
        loss, plain = relevance.loss(model, x, y, F.cross_entropy), F.cross_entropy(model(x), y)
        gated.append(not torch.equal(loss, plain))
        loss.backward()
        relevance.step()
    assert gated == [step % 3 == 0 for step in range(7)]
    assert (relevance.steps, relevance.state_dict()["batches"]) == (7, 3)
    assert relevance.required_steps(64) == 3 * watching(estimator, drop=0.5)[1].required_steps(64)


def test_steps_without_draws_count_in_the_half_life() -> None:
    evidence = []
    for every, half_life in ((1, 5.0), (4, 20.0)):
        torch.manual_seed(0)
        model, relevance = watching(observe_every=every, half_life=half_life)
        for step in range(12):
            if step % 4 == 0 or every == 4:
                relevance.loss(model, *digits_like(seed=step - step % 4), F.cross_entropy).backward()
                relevance.step()
        evidence.append(relevance)
    assert evidence[0].scores()["3"] == pytest.approx(evidence[1].scores()["3"], rel=1e-5)


@pytest.mark.parametrize("estimator", ["soft", "loss", "mixed"])
def test_undecided_channels_are_drawn_twice_as_often(trained: nn.Module, estimator: str) -> None:
    relevance = watcher(
        compressor.trace(copy.deepcopy(trained), digits_like(2)[0]), estimator=estimator, half_life=1e9, drop=0.25
    )
    observe(relevance.graph.model, relevance, 60)
    relevant = relevance.state_dict()["sampler"]["relevant"]
    decided = {name: p > 0.99 for name, p in relevance.confidence().items()}
    assert 0 < int(torch.cat(list(decided.values())).sum()) < 24
    with relevance.observe(4000) as observation:
        pass
    often = observation.draw[:, :24].float().mean(0)
    relevant = torch.cat(list(decided.values()))
    assert often[relevant] == pytest.approx(torch.full_like(often[relevant], 0.125), abs=0.02)
    assert often[~relevant] == pytest.approx(torch.full_like(often[~relevant], 0.25), abs=0.02)
    undecided = relevance.undecided()
    assert not any(bool((undecided[name] & decided[name]).any()) for name in decided)
    assert relevance.record()["3"]["undecided"] == int(undecided["3"].sum())


def test_the_published_method_draws_all_channels_alike(trained: nn.Module) -> None:
    relevance = watcher(
        compressor.trace(copy.deepcopy(trained), digits_like(2)[0]), estimator="source", confidence=0.01
    )
    observe(relevance.graph.model, relevance, 20)
    assert any(bool((p > 0.01).any()) for p in relevance.confidence().values())
    draws = []
    for _ in range(2000):
        with relevance.observe(1) as observation:
            draws.append(observation.draw[0, :24])
    often = torch.stack(draws).float().mean(0)
    assert often == pytest.approx(torch.full_like(often, 0.05), abs=0.025)


def test_a_channel_that_was_drawn_less_often_is_less_certain() -> None:
    """Its dummies, drawn at the full rate, are spread as if they had been drawn as seldom."""
    evidence = Evidence(ESTIMATORS["loss"], torch.tensor([0] * 8 + [1] * 16), dummies=100)
    sums = evidence.state_dict()
    sums["dummies"]["totals"] += torch.randn(100, 2)
    sums["dummies"]["weights"] += 1.0
    sums["relevance"]["weights"][0] += torch.tensor([1.0, 0.25] * 12)
    evidence.load_state_dict(sums)
    spread = evidence.dummies().std(0)
    assert spread[1::2] == pytest.approx(2 * spread[::2], rel=1e-4)
    middle = float((sums["dummies"]["totals"].sum(0) / sums["dummies"]["weights"].sum(0))[:, 0].mean())
    assert evidence.dummies().mean(0)[:8].tolist() == pytest.approx([middle] * 8, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "batch", "steps"),
    [
        ({"estimator": "soft", "drop": 0.5}, 8, 6),  # (2.33 + 0.84)^2 / (1/2 * 1/2) = 40.2 samples
        ({"estimator": "loss", "drop": 0.5}, 64, 1),
        ({"estimator": "source", "drop": 0.5}, 64, 41),
        ({"estimator": "soft", "drop": 0.1}, 8, 14),  # 111.6 samples
        ({"estimator": "soft", "drop": 0.5, "confidence": 1.0}, 1, 1),  # no test, nothing to resolve
    ],
)
def test_the_steps_that_resolve_anything(settings: dict, batch: int, steps: int) -> None:
    assert watching(**settings)[1].required_steps(batch) == steps


# -- what a training loop may rely on


@pytest.mark.parametrize("estimator", NAMES)
def test_everything_that_is_known_has_its_shape(estimator: str) -> None:
    model, relevance = watching(estimator)
    before = [relevance.scores(), relevance.confidence()]
    assert all(float(values.abs().sum()) in (0.0, 4.0, 8.0) for each in before for values in each.values())
    observe(model, relevance, 4)
    for values in (relevance.scores(), relevance.confidence()):
        assert {name: (tuple(v.shape), v.dtype) for name, v in values.items()} == {
            "0": ((8,), torch.float32),
            "3": ((16,), torch.float32),
        }
        assert all(bool(v.isfinite().all()) for v in values.values())
    assert {name: tuple(mean.shape) for name, mean in relevance.means().items()} == {
        "3.weight": (8,),
        "8.weight": (64,),
    }
    assert all(-1 <= value <= 1 for value in relevance.reliability().values())
    record = json.loads(json.dumps(relevance.record(), allow_nan=False))
    assert set(record["3"]) == {"r", "confidence", "n", "dummies_mean", "dummies_spread", "undecided", "reliability"}
    assert (len(record["3"]["r"]), len(record["0"]["confidence"])) == (16, 8)
    assert relevance.steps == 4


def test_n_counts_the_samples_that_drew_a_channel() -> None:
    model, relevance = watching(drop=0.25, half_life=1e9)
    observe(model, relevance, 3)
    assert relevance.record()["0"]["n"] == pytest.approx([3 * 64 / 4] * 8, abs=0.1)


def test_the_seed_decides_and_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    model, relevance = watching(seed=1)
    start = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    observe(model, relevance, 3)
    assert torch.equal(torch.get_rng_state(), state)
    results = []
    for seed in (1, 1, 2):
        model.load_state_dict(start)
        other = watcher(compressor.trace(model, digits_like(2)[0]), seed=seed)
        observe(model, other, 3)
        results.append(other.scores()["3"])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("estimator", ["soft", "gate"])
def test_a_scaled_or_accumulated_loss_gives_the_same_relevance(estimator: str) -> None:
    """A gradient scaler multiplies the loss, accumulation divides it: relevance is that of the losses."""
    model = convolutional().train()
    graph, found = compressor.trace(model, digits_like(2)[0]), []
    for factor in (1.0, 512.0, 0.5):
        relevance = watcher(graph, estimator=estimator)
        for step in range(0, 4, 2):
            for part in (step, step + 1):
                (factor * relevance.loss(model, *digits_like(seed=part), F.cross_entropy)).backward()
            relevance.step()
        assert (relevance.steps, relevance.state_dict()["batches"]) == (2, 4)
        found.append(relevance.scores()["3"])
    assert found[1:] == [pytest.approx(found[0], rel=1e-4, abs=1e-6)] * 2


def test_overflow_in_one_step_leaves_no_trace() -> None:
    model, relevance = watching()
    observe(model, relevance, 2)
    before = relevance.scores()
    (relevance.loss(model, *digits_like(), F.cross_entropy) * math.inf).backward()
    relevance.step()
    after = relevance.scores()
    assert all(after[name] == pytest.approx(scores, rel=1e-4) for name, scores in before.items())


def test_training_is_that_of_the_gated_model_and_leaves_no_hook() -> None:
    model, relevance = watching()
    loss = relevance.loss(model, *digits_like(), F.cross_entropy)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert (loss.dim(), loss.requires_grad) == (0, True)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not any("gate" in name for name in model.state_dict())


@pytest.mark.parametrize("estimator", NAMES)
def test_a_resumed_run_goes_on_bit_for_bit(estimator: str) -> None:
    model, relevance = watching(estimator)
    observe(model, relevance, 3)
    state = copy.deepcopy(relevance.state_dict())
    start = copy.deepcopy(model.state_dict())
    observe(model, relevance, 3, first=3)
    model.load_state_dict(start)
    resumed = watcher(compressor.trace(model, digits_like(2)[0]), estimator=estimator, seed=77)
    resumed.load_state_dict(state)
    observe(model, resumed, 3, first=3)
    assert resumed.record() == relevance.record()
    assert all(torch.equal(mean, resumed.means()[name]) for name, mean in relevance.means().items())


def test_the_state_is_a_copy_that_loads_without_code(tmp_path) -> None:
    model, relevance = watching()
    observe(model, relevance, 2)
    torch.save(relevance.state_dict(), tmp_path / "state.pt")
    state, scores = relevance.state_dict(), relevance.scores()["0"]
    observe(model, relevance, 2)
    for each in (state, torch.load(tmp_path / "state.pt", weights_only=True)):
        relevance.load_state_dict(each)
        assert torch.equal(relevance.scores()["0"], scores)


@pytest.mark.parametrize("estimator", NAMES)
def test_statistics_follow_a_cut(estimator: str) -> None:
    model, relevance = watching(estimator)
    graph = relevance.graph
    observe(model, relevance, 6)
    scores, p, means = relevance.scores(), relevance.confidence(), relevance.means()
    keep = {"0": torch.tensor([1, 4, 6])}
    compressor.cut(graph, keep)
    relevance.narrow(keep, graph)
    assert relevance.scores()["0"] == pytest.approx(scores["0"][keep["0"]], rel=2e-3)  # among fewer, drawn a bit apart
    assert torch.equal(relevance.scores()["3"], scores["3"])
    assert torch.equal(relevance.confidence()["0"], p["0"][keep["0"]])
    assert torch.equal(relevance.means()["3.weight"], means["3.weight"][keep["0"]])
    observe(model, relevance, 2, first=6)
    assert {name: len(each) for name, each in relevance.scores().items()} == graph.sizes()


@pytest.mark.parametrize("estimator", ["soft", "loss"])
def test_statistics_go_on_without_a_group_that_was_frozen(estimator: str) -> None:
    model, relevance = watching(estimator)
    observe(model, relevance, 3)
    scores, p = relevance.scores(), relevance.confidence()
    relevance.graph.freeze(["0"], "a test")
    relevance.narrow({}, relevance.graph)
    assert relevance.scores().keys() == {"3"}
    assert relevance.scores()["3"] == pytest.approx(scores["3"], abs=1e-6)
    assert relevance.confidence()["3"] == pytest.approx(p["3"], abs=1e-6)
    state = relevance.state_dict()
    resumed = watcher(compressor.trace(model, digits_like(2)[0]), estimator=estimator)
    resumed.load_state_dict(state)
    assert resumed.graph.sizes() == {"3": 16}
    assert torch.equal(resumed.confidence()["3"], relevance.confidence()["3"])
    observe(model, resumed, 1)


def test_groups_that_no_module_shows_are_frozen() -> None:
    graph = judged()
    rows = torch.arange(2).unsqueeze(1)
    members = (Member("x", 0, rows, "producer"), Member("y", 1, rows, "consumer"))
    graph.groups = (*graph.groups, Group("blind", 2, members))
    assert watcher(graph).scores().keys() == {"0"}
    assert graph.sizes() == {"0": 4}
    assert "no module sees these channels" in graph.frozen[0].reason


# -- refusals


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"estimator": "sofd"}, UnknownNameError, "unknown relevance estimator 'sofd': did you mean 'soft'"),
        ({"drop": 0.0}, RangeError, r"drop = 0.0 is out of range: give drop in \(0, 0\.5\]"),
        ({"drop": 0.6}, RangeError, "drop = 0.6"),
        ({"confidence": 0.0}, RangeError, r"confidence = 0\.0 is out of range: give confidence in \(0, 1\]"),
        ({"confidence": 1.01}, RangeError, "confidence = 1.01"),
        (
            {"observe_every": 0},
            RangeError,
            r"observe_every = 0 is out of range: give observe_every in 1, 2, 3, \.\.\. steps",
        ),
        ({"warmup": -1}, RangeError, r"warmup = -1 is out of range: give warmup in 0, 1, 2, \.\.\. steps"),
        ({"dummies": 9}, RangeError, "dummies = 9"),
        ({"half_life": 0.0}, RangeError, r"half_life = 0\.0 is out of range: give half_life in \(0, inf\) steps"),
    ],
)
def test_settings_out_of_range(settings: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        watching(**settings)


def test_step_needs_a_batch_and_a_backward_pass() -> None:
    model, relevance = watching()
    with pytest.raises(InputError, match=r"step\(\) came without a batch"):
        relevance.step()
    before = copy.deepcopy(relevance.state_dict()["evidence"])
    relevance.loss(model, *digits_like(), F.cross_entropy)
    with pytest.raises(InputError, match=r"step\(\) came before backward\(\)"):
        relevance.step()
    for name, sums in relevance.state_dict()["evidence"].items():
        assert torch.equal(sums["weights"], before[name]["weights"])
    observe(model, relevance, 1)


@pytest.mark.parametrize("estimator", ["soft", "gate", "mixed"])
def test_losses_without_gradients_are_refused_where_gradients_are_read(estimator: str) -> None:
    model, relevance = watching(estimator)
    with torch.no_grad(), pytest.raises(InputError, match=r"losses carry no gradients.*leave torch\.no_grad\(\)"):
        relevance.loss(model, *digits_like(), F.cross_entropy)
    model, relevance = watching("loss")
    with torch.no_grad():
        relevance.loss(model, *digits_like(), F.cross_entropy)
    relevance.step()


def test_a_control_variate_leaves_the_model_and_its_random_state_alone() -> None:
    """BatchNorm's buffers, and dropout: both runs of a step draw the same, and the next random number is the same."""
    model = nn.Sequential(*convolutional()[:-1], nn.Dropout(0.5), nn.Linear(64, 4)).train()
    other = copy.deepcopy(model)
    x, y = digits_like()
    relevance = watcher(compressor.trace(model, x[:2]), estimator="mixed", warmup=9)  # at first nothing is drawn
    outputs: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
    torch.manual_seed(4)
    loss = relevance.loss(model, x, y, F.cross_entropy)
    after = torch.rand(1)
    handle.remove()
    torch.manual_seed(4)
    assert torch.equal(F.cross_entropy(other(x), y), loss)
    assert torch.equal(torch.rand(1), after)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    ungated, gated = outputs
    assert torch.equal(ungated, gated)


def test_a_loss_must_be_one_per_sample() -> None:
    model, relevance = watching()
    with pytest.raises(InputError, match=r"losses of shape \(\) came for 64 samples: .*reduction='none'"):
        relevance.loss(model, *digits_like(), lambda out, y, reduction="mean": F.cross_entropy(out, y))
    observe(model, relevance, 1)


def test_a_model_that_does_not_pass_the_gates_is_refused() -> None:
    model, relevance = watching()
    with pytest.raises(InputError, match=r"did not run under the gates: call model\.train\(\)"):
        relevance.loss(copy.deepcopy(model), *digits_like(), F.cross_entropy)
    model.eval()
    with pytest.raises(InputError, match="did not run under the gates"):
        relevance.loss(model, *digits_like(), F.cross_entropy)


@pytest.mark.parametrize("other", [{"estimator": "gate"}, {"dummies": 50}])
def test_a_state_of_other_settings_is_refused(other: dict) -> None:
    _, relevance = watching()
    _, different = watching(**other)
    with pytest.raises(InputError, match=r"this state is of (estimator|dummies) (gate|50), not"):
        relevance.load_state_dict(different.state_dict())


def test_a_cut_that_is_not_the_one_of_the_graph_is_refused() -> None:
    model, relevance = watching()
    observe(model, relevance, 1)
    before = relevance.state_dict()["sizes"]
    with pytest.raises(InputError, match="keep leaves 2 channels of group '0', the graph has 8"):
        relevance.narrow({"0": torch.tensor([0, 1])}, relevance.graph)
    with pytest.raises(InputError, match="group '0' was not watched before the cut"):
        watcher(judged_without_first()).narrow({}, relevance.graph)
    assert relevance.state_dict()["sizes"] == before


def judged_without_first() -> ChannelGraph:
    graph = judged()
    graph.groups = tuple(Group("other", each.size, each.members, each.inputs) for each in graph.groups)
    return graph
