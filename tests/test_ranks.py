"""Several processes train and prune one model: what they come to is what one process comes to on the whole batch."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import RANKS, launched
from torch import Tensor, nn
from torch.distributed import get_rank, group, init_process_group
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from user_models import tiny

import compressor
from compressor._utils import Ranks
from compressor.errors import InputError
from compressor.relevance import RelevanceConfig
from compressor.training import TrainingConfig, load_data, require_synchronizable, train
from compressor.training.sync_norms import synchronized_norms

BATCH, STEPS = 32, 50
CASES: dict[str, dict[str, Any]] = {
    **{
        # Excluded channels become zero, not their mean: in its forward pass a rank knows only its own.
        f"relevance, {name}": {"criterion": "relevance", "relevance": RelevanceConfig(name, exclude="zero")}
        for name in ("gate", "soft", "mixed", "loss")
    },
    "relevance, globally": {"criterion": "relevance", "allocate": "global"},
    "relevance, of no losses": {"criterion": "relevance"},
    "taylor": {"criterion": "taylor"},
    "random": {"criterion": "random"},
    "l1, what is left predicts": {"criterion": "l1", "compensate": "linear"},
}


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(BATCH, 3, 8, 8, dtype=torch.float64, generator=generator),
            torch.randint(0, 10, (BATCH,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def pruned(case: str, rank: int, ranks: int, **more: Any) -> dict[str, Any]:
    """Return the losses of every step, and the weights at the end, of a training as one of so many ranks."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = tiny(10).double()
    if ranks > 1:
        more["process_group"] = group.WORLD
    how = CASES[case]
    if how.get("compensate") == "linear":
        how = {**how, "calibration": [x for x, _ in batches()[:4]]}
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    pruner = compressor.Pruner(
        model, torch.zeros(1, 3, 8, 8, dtype=torch.float64), budget=0.5, optimizer=optimizer, total_steps=STEPS,
        prune_every=10, **{"round_to": 1, **how, **more},
    )  # fmt: skip
    run: nn.Module = DistributedDataParallel(model) if ranks > 1 else model
    losses = []
    for x, y in batches():
        model.train()
        for module in model.modules():  # BatchNorm's own statistics are of a rank's samples, not of all
            module.train(not isinstance(module, nn.BatchNorm2d))
        x, y = x.chunk(ranks)[rank], y.chunk(ranks)[rank]
        with pruner.observe(x) as mean:
            each = F.cross_entropy(run(x), y, reduction="none")
            loss = each.mean() if case.endswith("no losses") else mean(each)
        loss.backward()
        optimizer.step()
        if pruner.step() and ranks > 1:
            run = DistributedDataParallel(model)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {"losses": losses, "weights": {name: each.detach() for name, each in model.named_parameters()}}


def every_case(rank: int) -> dict[str, Any]:
    return {case: pruned(case, rank, RANKS) for case in CASES}


def everything(folder: Path) -> dict[str, Any]:
    """Of one pair of processes all that the tests ask for: they take long to start."""
    works = (every_case, different_widths, loss_of_the_bare_model, one_of_each, loops, synchronized_step)
    init_process_group("gloo")
    return {work.__name__: work(get_rank()) for work in works}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launched(everything, tmp_path_factory.mktemp("ranks"))


@pytest.fixture
def together(asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each["every_case"] for each in asked]


@pytest.mark.parametrize("case", CASES)
def test_ranks_come_to_what_one_process_comes_to(case: str, together: list[dict[str, Any]]) -> None:
    alone = pruned(case, 0, 1)
    first, second = (each[case] for each in together)
    dense = sum(parameter.numel() for parameter in tiny(10).parameters())
    assert sum(each.numel() for each in alone["weights"].values()) < 0.55 * dense
    losses = [sum(each) / RANKS for each in zip(first["losses"], second["losses"], strict=True)]
    assert losses == pytest.approx(alone["losses"], rel=1e-5)
    assert first["losses"] != second["losses"]  # they did see different images
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-5, atol=1e-7)
        assert torch.equal(first["weights"][name], second["weights"][name])


def different_widths(rank: int) -> str:
    try:
        pruned("random", rank, RANKS, round_to=1 + 3 * rank)
    except InputError as error:
        return str(error)
    return ""


def test_ranks_that_decide_differently_all_stop(asked: list[dict[str, Any]]) -> None:
    said = [each["different_widths"] for each in asked]
    assert len(set(said)) == 1
    assert "the 2 ranks have different channels that stay: begin on all of them with the same model" in said[0]


def loss_of_the_bare_model(rank: int) -> str:
    model = tiny(10)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    x, y = torch.randn(4, 3, 8, 8), torch.randint(0, 10, (4,))
    pruner = compressor.Pruner(model, x, "l1", optimizer=optimizer, total_steps=9, process_group=group.WORLD)
    x, y = torch.randn(4, 3, 8, 8) + rank, torch.randint(0, 10, (4,))  # each rank its own images
    try:
        pruner.loss(x, y, F.cross_entropy).backward()
        optimizer.step()
        pruner.step()
    except InputError as error:
        return str(error)
    return ""


def test_gradients_that_nobody_averages_are_refused(asked: list[dict[str, Any]]) -> None:
    assert all("with pruner.observe(x) as mean" in each["loss_of_the_bare_model"] for each in asked)


def one_of_each(rank: int) -> dict[str, Any]:
    ranks = Ranks(group.WORLD)
    own = torch.tensor([[rank, 1.0], [rank, 2.0]])
    gathered = ranks.gathered({"x": (own, own[:, 0] > 0), "none": None})
    first = ranks.of_the_first({"a": own})
    summed = [own.clone(), torch.full((2,), float(rank), dtype=torch.float64), own[0, 0].clone(), own.long()]
    ranks.sum_(summed)
    return {
        "gathered": gathered,
        "mean": ranks.mean({"a": own}),
        "first": first,
        "own": ranks.own_rows(gathered["x"][0]),
        "summed": summed,
        "any": ranks.any([rank == 0, rank == 1, False]),
        "objects": ranks.objects({"rank": rank}),
        "object": ranks.object_of_the_first([rank]),
    }


def test_what_one_rank_has_all_get(asked: list[dict[str, Any]]) -> None:
    for rank, got in enumerate(each["one_of_each"] for each in asked):
        assert got["gathered"]["x"][0].tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
        assert got["gathered"]["x"][1].tolist() == [False, False, True, True]
        assert got["gathered"]["none"] is None
        assert got["mean"]["a"].tolist() == [[0.5, 1], [0.5, 2]]
        assert got["first"]["a"].tolist() == [[0, 1], [0, 2]]
        assert got["own"].tolist() == [[rank, 1], [rank, 2]]
        assert [each.tolist() for each in got["summed"]] == [[[1, 2], [1, 4]], [1, 1], 1, [[1, 2], [1, 4]]]
        assert got["any"] == [True, True, False]
        assert got["objects"] == [{"rank": 0}, {"rank": 1}]
        assert got["object"] == [0]


# -- our own loop


def loop_of(rank: int, criterion: str, model: nn.Module, **more: Any) -> dict[str, Any]:
    """Train and prune by our own loop as one of the ranks there are, and return what came out on this one."""
    torch.set_num_threads(1)
    ranks = Ranks(group.WORLD if torch.distributed.is_initialized() else None)
    data = load_data("digits", seed=0)
    config = TrainingConfig(epochs=2, batch_size=64, lr=0.02, seed=5, label_smoothing=0.1, clip_norm=1.0, **more)

    def pruner(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> compressor.Pruner:
        return compressor.Pruner(
            model, torch.zeros(1, *data.image_shape), criterion, 0.5, optimizer=optimizer, total_steps=steps,
            round_to=1, process_group=ranks.group, relevance=GATES_OF_ZERO if criterion == "relevance" else None,
        )  # fmt: skip

    if rank:
        for parameter in model.parameters():
            parameter.data.zero_()  # the first one's weights count
    kinds = [type(module) for module in model.modules()]
    history = train(model, data, config, pruner, ranks=ranks)
    assert [type(module) for module in model.modules()] == kinds
    return {"records": history.records, "tensors": {**dict(model.named_parameters()), **dict(model.named_buffers())}}


GATES_OF_ZERO = RelevanceConfig("gate", exclude="zero")


def without_norms() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip


def loops(rank: int) -> dict[str, dict[str, Any]]:
    made = {criterion: loop_of(rank, criterion, without_norms()) for criterion in ("relevance", "taylor")}
    torch.manual_seed(0)
    made |= {"norms": loop_of(rank, "l1", tiny(10))}
    nn.SyncBatchNorm.forward = over_all_ranks  # in this process, which is gone after the test
    torch.manual_seed(0)
    return made | {"synchronized": loop_of(rank, "l1", tiny(10), sync_batchnorm=True)}


def over_all_ranks(self: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    """What torch has on GPUs alone, in plain operations."""
    if not self.training:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
    n = RANKS * x.numel() / x.shape[1]
    mean = all_reduce(x.sum((0, 2, 3)), group=self.process_group) / n
    var = all_reduce((x - mean[:, None, None]).square().sum((0, 2, 3)), group=self.process_group) / n
    with torch.no_grad():
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * n / (n - 1), self.momentum)
    scaled = (x - mean[:, None, None]) * (self.weight / (var + self.eps).sqrt())[:, None, None]
    return scaled + self.bias[:, None, None]


@pytest.fixture
def trained_together(asked: list[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    return [each["loops"] for each in asked]


@pytest.mark.parametrize("criterion", ["relevance", "taylor"])
def test_our_loop_on_ranks_is_our_loop_alone(criterion: str, trained_together: list[dict[str, dict[str, Any]]]) -> None:
    alone = loop_of(0, criterion, without_norms())
    for got in trained_together:
        assert len(got[criterion]["records"]) == len(alone["records"])
        for record, expected in zip(got[criterion]["records"], alone["records"], strict=True):
            for name in ("train_loss", "validation_loss", "validation_accuracy", "params", "widths"):
                if isinstance(expected.get(name), float):
                    assert record[name] == pytest.approx(expected[name], rel=1e-4), name
                else:
                    assert record.get(name) == expected.get(name), name
        for name, tensor in alone["tensors"].items():
            torch.testing.assert_close(got[criterion]["tensors"][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("which", ["norms", "synchronized"])
def test_all_ranks_keep_the_same_statistics(which: str, trained_together: list[dict[str, dict[str, Any]]]) -> None:
    first, second = (got[which]["tensors"] for got in trained_together)
    assert any("running_var" in name for name in first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def synchronized_step(rank: int) -> dict[str, Tensor]:
    """Of one step in double precision, on this rank's images: the mean gradients, and what the norms keep."""
    torch.manual_seed(0)
    model, ranks = tiny(10).double(), Ranks(group.WORLD if torch.distributed.is_initialized() else None)
    images = torch.randn(16, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    classes = torch.arange(16) % 10
    with synchronized_norms(model, ranks) if ranks.size > 1 else nullcontext():
        F.cross_entropy(model(ranks.own_rows(images)), ranks.own_rows(classes)).backward()
    means = ranks.mean({name: parameter.grad for name, parameter in model.named_parameters()})
    return {**means, **{name: buffer.double() for name, buffer in model.named_buffers()}}


def test_synchronized_norms_look_at_the_whole_batch(asked: list[dict[str, Any]]) -> None:
    alone = synchronized_step(0)
    for got in (each["synchronized_step"] for each in asked):
        for name, tensor in alone.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-9, atol=1e-12)


def test_a_rank_alone_keeps_its_norms() -> None:
    model = tiny(10)
    with synchronized_norms(model, Ranks()):  # a trial of learning rates: in SyncBatchNorm it would wait for others
        assert [type(model[index]) for index in (1, 4, 7)] == [nn.BatchNorm2d] * 3


def test_norms_that_cannot_be_synchronized_are_refused() -> None:
    with pytest.raises(InputError, match="no effect in one process"):
        require_synchronizable(Ranks(), "cuda")
    several = Ranks()
    several.size = 2
    with pytest.raises(InputError, match="on GPUs alone"):
        require_synchronizable(several, "cpu")
    require_synchronizable(several, "cuda:0")
