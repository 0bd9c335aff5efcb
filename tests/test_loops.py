"""People's own training loops: whatever they do around the pruner goes on, and nothing of ours stays behind."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor import Budget, Linear, Pruner
from compressor.errors import InputError
from compressor.relevance import RelevanceConfig
from compressor.sparse import SparseConfig

STEPS = 48


class Net(nn.Module):
    """A residual network with everything that a cut touches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.one, self.two = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn(self.stem(x)))
        return self.head(F.relu(h + self.two(F.relu(self.one(h)))).mean((2, 3)))


X = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(4, (16,), generator=torch.Generator().manual_seed(2))
CRITERIA = ["relevance", "l1", "taylor"]


def made(model: nn.Module, optimizer, criterion: str, **options) -> Pruner:
    options = {"total_steps": STEPS, "prune_every": 12, "schedule": Linear(0.1, 0.8), "round_to": 1, **options}
    if criterion == "relevance":
        options = {"relevance": RelevanceConfig(drop=0.15), **options}  # few steps: many channels in each
    return Pruner(model, X, criterion, Budget(0.5, "channels"), optimizer=optimizer, **options)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


def nothing_left(model: nn.Module) -> bool:
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def shrunk(pruner: Pruner) -> bool:
    """Whether half of the 40 channels are gone, of the modules too."""
    model, result = pruner.graph.model, pruner.result()
    assert isinstance(model, Net)
    return result.reached and model.stem.out_channels + model.one.out_channels == result.channels[1] <= 20


@pytest.mark.parametrize("criterion", CRITERIA)
def test_ones_own_forward_pass(criterion: str) -> None:
    model = Net()
    optimizer = sgd(model)
    pruner = made(model, optimizer, criterion)
    for _ in range(STEPS):
        with pruner.observe(X) as mean:
            loss = mean(F.cross_entropy(model(X), Y, reduction="none"))
        loss.backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        assert nothing_left(model)
    assert shrunk(pruner)


def test_ones_own_forward_pass_observes_what_the_call_of_loss_observes() -> None:
    scores = []
    for own in (False, True):
        torch.manual_seed(0)
        model = Net()
        optimizer = sgd(model)
        pruner = made(model, optimizer, "relevance", relevance=RelevanceConfig("soft", drop=0.15))
        for _ in range(4):
            if own:
                with pruner.observe(X) as mean:
                    loss = mean(F.cross_entropy(model(X), Y, reduction="none"))
            else:
                loss = pruner.loss(X, Y, F.cross_entropy)
            loss.backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
        assert pruner.relevance
        scores.append(pruner.relevance.scores())
    assert all(torch.equal(scores[0][name], scores[1][name]) for name in scores[0])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_autocast_and_a_gradient_scaler(criterion: str) -> None:
    model = Net()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=256.0)
    pruner = made(model, optimizer, criterion)
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            loss = pruner.loss(X, Y, F.cross_entropy)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        pruner.step()
        optimizer.zero_grad()
    assert shrunk(pruner)
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_gradient_accumulation(criterion: str) -> None:
    model = Net()
    optimizer = sgd(model)
    pruner = made(model, optimizer, criterion)
    for _ in range(STEPS):
        for half in (slice(0, 8), slice(8, 16)):
            (pruner.loss(X[half], Y[half], F.cross_entropy) / 2).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    assert shrunk(pruner)


def test_every_accumulated_batch_is_observed() -> None:
    samples = []
    for halves in ([slice(0, 8)], [slice(0, 8), slice(8, 16)]):
        model = Net()
        optimizer = sgd(model)
        config = RelevanceConfig(drop=0.5, warmup=0, observe_every=1)
        pruner = made(model, optimizer, "relevance", relevance=config)
        for half in halves:
            (pruner.loss(X[half], Y[half], F.cross_entropy) / len(halves)).backward()
        optimizer.step()
        pruner.step()
        assert pruner.relevance
        samples.append(sum(pruner.relevance.record()["stem"]["n"]))
    assert samples[0] == 8 * 16 / 2  # each sample draws half of the 16 channels
    assert samples[1] > 1.9 * samples[0]  # the older batch counts a little less


@pytest.mark.parametrize("criterion", CRITERIA)
def test_several_optimizers_and_a_scheduler(criterion: str) -> None:
    model = Net()
    trunk = [parameter for name, parameter in model.named_parameters() if "head" not in name]
    optimizers = [torch.optim.AdamW(trunk, lr=1e-3), torch.optim.SGD(model.head.parameters(), lr=0.01, momentum=0.9)]
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[0], STEPS)
    pruner = made(model, optimizers, criterion)
    for _ in range(STEPS):
        pruner.loss(X, Y, F.cross_entropy).backward()
        for optimizer in optimizers:
            optimizer.step()
        scheduler.step()
        pruner.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert shrunk(pruner)
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            assert all(v.shape in (parameter.shape, torch.Size([])) for v in state.values() if isinstance(v, Tensor))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_frozen_layers_stay_frozen(criterion: str) -> None:
    model = Net()
    model.stem.requires_grad_(False)
    before = model.stem.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
    pruner = made(model, optimizer, criterion)
    for _ in range(STEPS):
        pruner.loss(X, Y, F.cross_entropy).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    assert shrunk(pruner)
    kept = list(model.stem.weight.detach().flatten(1))
    assert all(any(torch.equal(row, old) for old in before.flatten(1)) for row in kept)
    assert model.stem.weight.grad is None


@pytest.mark.parametrize("criterion", CRITERIA)
def test_inference_in_the_middle_is_that_of_the_model_as_it_is(criterion: str) -> None:
    model = Net()
    optimizer = sgd(model)
    pruner = made(model, optimizer, criterion)
    for step in range(STEPS):
        loss = pruner.loss(X, Y, F.cross_entropy)
        if step % 7 == 0:  # between the forward and the backward pass
            plain = copy.deepcopy(model.state_dict())
            model.eval()
            with torch.no_grad():
                first, second = model(X), model(X)
            assert torch.equal(first, second)
            model.train()
            assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())
        loss.backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    assert shrunk(pruner)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_moving_average_is_cut_along(criterion: str) -> None:
    model = Net()
    optimizer = sgd(model)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    pruner = made(model, optimizer, criterion, copies=[average.module])
    for _ in range(STEPS):
        pruner.loss(X, Y, F.cross_entropy).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    assert shrunk(pruner)
    model.eval()
    average.eval()
    with torch.no_grad():
        assert relative_error(average(X), model(X)) < 0.5


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_compiled_model(criterion: str) -> None:
    torch._dynamo.reset()
    model = Net()
    compiled = torch.compile(model, backend="eager")
    optimizer = sgd(model)
    pruner = made(compiled, optimizer, criterion)
    for _ in range(STEPS):
        pruner.loss(X, Y, F.cross_entropy).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    assert shrunk(pruner)
    compiled.eval()
    with torch.no_grad():
        assert torch.allclose(compiled(X), model.eval()(X))
    torch._dynamo.reset()


def test_an_exception_leaves_no_hook() -> None:
    model = Net()
    pruner = made(model, sgd(model), "relevance")
    with pytest.raises(ZeroDivisionError), pruner.observe(X):
        model(X).sum() / (1 // 0)
    assert nothing_left(model)
    with pytest.raises(ZeroDivisionError):
        pruner.loss(X, Y, lambda *args, **options: 1 / 0)
    assert nothing_left(model)


@pytest.mark.parametrize("criterion", ["relevance", "l1"])
def test_an_optimizer_of_another_model_is_refused(criterion: str) -> None:
    with pytest.raises(InputError, match=r"the optimizer holds none of the model's 9 parameters \('stem.weight'"):
        made(Net(), sgd(Net()), criterion)


def test_pruning_a_compiled_model_cuts_the_model_itself() -> None:
    model = Net()
    result = compressor.prune(torch.compile(model, backend="eager"), X, budget=compressor.Budget(0.5, "channels"))
    assert result.reached
    assert model.stem.out_channels < 16 or model.one.out_channels < 24


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_sparse_training_in_ones_own_loop(granularity: str) -> None:
    model = Net()
    optimizer = sgd(model)
    options = {"config": SparseConfig(granularity), "prune_every": 6, "total_steps": STEPS}
    training = compressor.SparseTraining(model, X, "rigl", Budget(0.5), optimizer=optimizer, **options)
    for _ in range(STEPS):
        with training.observe(X) as mean:
            loss = mean(F.cross_entropy(model(X), Y, reduction="none"))
        loss.backward()
        optimizer.step()
        training.step()
        optimizer.zero_grad()
    assert training.steps == STEPS
    assert training.result().reached


@pytest.mark.parametrize(
    ("criterion", "granularity"), [("rigl", "weight"), ("rigl", "channel"), ("magnitude", "channel")]
)
def test_a_moving_average_is_masked_and_cut_along(criterion: str, granularity: str) -> None:
    model = Net()
    optimizer = sgd(model)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    options = {
        "config": SparseConfig(granularity),
        "prune_every": 6,
        "total_steps": STEPS,
        "copies": [average.module],
    }
    if granularity == "channel":
        options["round_to"] = 1
    training = compressor.SparseTraining(model, X, criterion, Budget(0.5), optimizer=optimizer, **options)
    for _ in range(STEPS):
        training.loss(X, Y, F.cross_entropy).backward()
        optimizer.step()
        average.update_parameters(model)  # before the masks: weights that are off have moved a little
        training.step()
        optimizer.zero_grad()
        same_zeros(model, average.module, training)
    assert training.result().reached
    assert (granularity == "weight") or model.one.out_channels < 24
    assert str(average.module) == str(model)
    model.eval()
    average.eval()
    with torch.no_grad():
        assert relative_error(average(X), model(X)) < 0.5


def same_zeros(model: nn.Module, average: nn.Module, training: compressor.SparseTraining) -> None:
    """Assert that whatever the masks have off is zero in the average too."""
    weights = dict(average.named_parameters())
    off = 0
    for name, where in training.units.zeros().items():
        off += int(where.expand_as(weights[name]).sum())
        assert not weights[name][where.expand_as(weights[name])].any()
    assert off > 0 or training.steps < 6 or training.steps > 0.6 * STEPS


@pytest.mark.parametrize("how", [{"ignore_index": 0}, {"weight": torch.tensor([9.0, 1.0, 0.5])}])
def test_a_loss_keeps_its_scale_while_samples_draw(how: dict) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3))
    # Nothing goes, so that a gated and a plain step differ by the gates alone, and none is drawn at a rate near 0.
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    x, y = torch.randn(16, 3, 8, 8), torch.randint(3, (16, 4, 4))
    pruner = Pruner(model, x[:1], "relevance", 0.3, optimizer=optimizer, total_steps=400)

    def loss_fn(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(outputs, targets, reduction=reduction, **how)

    expected = loss_fn(model(x), y)
    expected.backward()
    gradient = model[3].weight.grad.clone()
    for _ in range(10):
        optimizer.zero_grad()
        loss = pruner.loss(x, y, loss_fn)
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=0.05)
        assert relative_error(model[3].weight.grad, gradient) < 0.2
        pruner.step()


def test_a_pruner_refuses_a_copy_of_another_model() -> None:
    model = Net()
    with pytest.raises(InputError, match=r"Linear is no copy of the model"):
        Pruner(model, X, "l1", optimizer=sgd(model), total_steps=STEPS, copies=[nn.Linear(2, 2)])


def test_an_average_of_a_compiled_model_is_cut_along() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    average = torch.optim.swa_utils.AveragedModel(torch.compile(model, backend="eager"))
    compressor.prune(model, torch.zeros(1, 3, 8, 8), "l1", 0.5, copies=[average.module])
    assert average.module._orig_mod[0].weight.shape == model[0].weight.shape


def test_sparse_training_refuses_a_copy_of_another_model() -> None:
    model = Net()
    with pytest.raises(
        InputError, match=r"Linear is no copy of the model: 'bias' is \(2,\) there and absent in the model"
    ):
        compressor.SparseTraining(
            model, X, optimizer=sgd(model), total_steps=STEPS, prune_every=6, copies=[nn.Linear(2, 2)]
        )
