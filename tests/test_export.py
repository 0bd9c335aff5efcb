"""The ONNX file is the model, or the gate says what differs and nothing is lost."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from compressor._utils import running as runtime
from compressor._utils.files import atomic_write
from compressor._utils.running import eval_mode
from compressor.deploy import export
from compressor.deploy.export import export_onnx
from compressor.deploy.parity import Parity, UnequalError, judge
from compressor.deploy.session import open_session
from compressor.errors import ExportError, InputError, ParityError, RangeError
from compressor.graph.tracing import trace
from compressor.surgery.cutting import cut

HERE = str(Path(__file__).parent.parent)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.head((x + self.norm(self.second(x))).relu().mean((2, 3)))


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.table, self.words = nn.Conv2d(3, 4, 3), nn.Linear(5, 4), nn.Embedding(11, 4)

    def forward(self, image: Tensor, table: Tensor, words: Tensor) -> dict[str, Any]:
        table = self.table(table)
        return {"scores": self.image(image).mean((2, 3)) - table, "more": (table, self.words(words)), "next": words + 1}


class FixedBatch(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.head = size, nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.view(self.size, -1))


class Branching(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else -x


def plain(classes: int = 5) -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, classes))


def depthwise() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    """The oracle: onnxruntime alone, with nothing of ours."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return [torch.from_numpy(y) for y in session.run(None, dict(zip(names, map(Tensor.numpy, inputs), strict=True)))]


def tables_of(model: nn.Module) -> list[Any]:
    """Everything about a model that an export could leave changed."""
    return [
        (
            type(module),
            module.training,
            sorted(vars(module)),
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
        )
        for module in model.modules()
    ] + [(name, id(tensor), id(tensor.grad), tensor.requires_grad) for name, tensor in model.named_parameters()]


# -- a file that passes


@pytest.mark.parametrize("make", [plain, Residual, depthwise])
@pytest.mark.parametrize("pruned", [False, True])
def test_the_file_gives_the_models_outputs_at_any_batch_size(make: Any, pruned: bool, tmp_path: Path) -> None:
    model, path = make().eval(), tmp_path / "m.onnx"
    if pruned:
        graph = trace(model, torch.randn(1, 3, 8, 8))
        cut(graph, {group.name: range(group.size // 2) for group in graph.groups})
    report = export_onnx(model, path, torch.randn(1, 3, 8, 8), check_inputs=torch.randn(9, 3, 8, 8))
    for size in (1, 2, 7, 30):
        inputs = torch.randn(size, 3, 8, 8)
        expected = model(inputs).detach()
        assert (run(path, inputs)[0] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert report.path == path
    assert report.size_bytes == path.stat().st_size
    assert report.opset == next(each.version for each in onnx.load(path).opset_import if not each.domain) == 18
    assert (report.images, report.top1_agreement) == (16, 1.0)
    assert report.max_abs_difference >= 0
    assert 0 <= report.relative <= 1e-4
    assert report.providers[0] == "CPUExecutionProvider"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_batch_is_dynamic_whatever_the_example_was(size: int, tmp_path: Path) -> None:
    export_onnx(plain(), tmp_path / "m.onnx", torch.randn(size, 3, 8, 8))
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [slot.name for slot in graph.output] == ["output"]
    for slot in (*graph.input, *graph.output):
        assert slot.type.tensor_type.shape.dim[0].dim_param


@pytest.mark.parametrize("how", ["tuple", "dict", "reversed dict"])
def test_several_inputs_and_outputs(how: str, tmp_path: Path) -> None:
    model = Several()
    given = {"image": torch.randn(1, 3, 8, 8), "table": torch.randn(1, 5), "words": torch.randint(11, (1, 6))}
    given = dict(reversed(given.items())) if how == "reversed dict" else given
    report = export_onnx(model, tmp_path / "m.onnx", tuple(given.values()) if how == "tuple" else given)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    more = {"image": torch.randn(3, 3, 8, 8), "table": torch.randn(3, 5), "words": torch.randint(11, (3, 6))}
    got = session.run(None, {name: tensor.numpy() for name, tensor in more.items()})
    expected = model(**more)
    names = ["output_scores", "output_more_0", "output_more_1", "output_next"]
    assert [slot.name for slot in session.get_outputs()] == names
    for ours, theirs in zip([expected["scores"], *expected["more"], expected["next"]], got, strict=True):
        assert torch.allclose(ours.detach(), torch.from_numpy(theirs), atol=1e-5)
    assert report.top1_agreement == 1.0


class OfBatch(nn.Module):
    """Takes its images in a dict, as the only argument."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.inner(batch["image"])


def test_a_dict_that_is_the_only_argument(tmp_path: Path) -> None:
    model, x = OfBatch().eval(), torch.randn(2, 3, 8, 8)
    export_onnx(model, tmp_path / "m.onnx", ({"image": x},))
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert torch.allclose(model({"image": x}).detach(), torch.from_numpy(got), atol=1e-5)


class Norms(nn.Module):
    """BatchNorms that no convolution stands before: behind a concatenation, at the end, and of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(8, eps=0.1), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.cat([self.first(x), x[:, :, 1:-1, 1:-1]], 1)).relu()
        return self.last(y.mean((2, 3)))


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_no_batch_norm_is_left(kind: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Norms()
    for _ in range(3):
        model(3 + 2 * torch.randn(16, 3, 8, 8))  # running statistics that are not 0 and 1
    with torch.no_grad():
        model.norm.weight.uniform_(-1, 1)
        model.norm.bias.uniform_(-1, 1)
    export_onnx(model.eval().to(kind), tmp_path / "m.onnx", torch.randn(1, 3, 8, 8, dtype=kind))  # its gate compares
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    read = {name for node in graph.node for name in node.input}
    assert {each.name for each in graph.initializer} <= read
    assert [each.name for each in graph.output] == ["output"]


def test_opset_23_and_a_model_without_classes(tmp_path: Path) -> None:
    report = export_onnx(nn.Conv2d(3, 4, 1), tmp_path / "m.onnx", torch.randn(1, 3, 4, 4), opset=23)
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == report.opset == 23
    assert report.top1_agreement != report.top1_agreement  # NaN


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = Residual().train()
    model.norm.eval()
    model.first.register_forward_hook(lambda module, args, output: output * 2)
    inputs = torch.randn(2, 3, 8, 8)
    model(inputs).sum().backward()
    before, state, random = tables_of(model), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    export_onnx(model, tmp_path / "m.onnx", inputs)
    assert tables_of(model) == before
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_running_a_model_leaves_the_random_state_and_records_no_gradients() -> None:
    model, random = Residual().train(), torch.get_rng_state()
    with eval_mode(model):
        assert not model.norm.training
        assert not model(torch.randn(1, 3, 8, 8)).requires_grad
    assert model.norm.training
    assert torch.equal(torch.get_rng_state(), random)


def test_nothing_is_printed_and_the_file_names_no_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_onnx(Residual(), tmp_path / "m.onnx", torch.randn(1, 3, 8, 8))
    with pytest.raises(ExportError):
        export_onnx(Branching(3, 3), tmp_path / "n.onnx", torch.randn(1, 3))
    assert capfd.readouterr() == ("", "")
    content = (tmp_path / "m.onnx").read_bytes()
    assert HERE.encode() not in content
    assert b"site-packages" not in content
    assert b".py" not in content


# -- a file that does not


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the exporter write another model than it was given."""
    right = torch.onnx.export

    def other(model: nn.Module, *rest: Any, **options: Any) -> Any:
        model = copy.deepcopy(model)
        with torch.no_grad():
            model[-1].bias[3] += 0.25
        return right(model, *rest, **options)

    monkeypatch.setattr(torch.onnx, "export", other)


@pytest.mark.usefixtures("wrong")
def test_a_file_that_differs_is_kept_beside_and_named(tmp_path: Path) -> None:
    path, model = tmp_path / "m.onnx", plain()
    path.write_text("what was there")
    message = (
        r"'output' differs by 0\.25 at batch size 1 on CPUExecutionProvider, and .* is allowed \(0\.0001 of its scale"
    )
    with pytest.raises(ParityError, match=message) as caught:
        export_onnx(model, path, torch.randn(1, 3, 8, 8))
    assert str(caught.value).startswith("the ONNX file is not the model: ")
    assert f"it is kept as {tmp_path / 'm.failed.onnx'}, other files are as they were" in str(caught.value)
    assert caught.value.kept == str(tmp_path / "m.failed.onnx")
    assert path.read_text() == "what was there"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["m.failed.onnx", "m.onnx"]
    inputs = torch.randn(2, 3, 8, 8)
    assert torch.allclose(
        run(tmp_path / "m.failed.onnx", inputs)[0] - model.eval()(inputs),
        torch.tensor([0.0, 0.0, 0.0, 0.25, 0.0]),
        atol=1e-6,
    )


def test_a_file_that_differs_only_on_the_callers_examples_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clipped(nn.Module):
        def __init__(self, limit: float) -> None:
            super().__init__()
            self.limit = limit

        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(max=self.limit)

    right = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda model, *rest, **options: right(Clipped(50.0), *rest, **options))
    export_onnx(Clipped(100.0), tmp_path / "m.onnx", torch.zeros(1, 4))
    with pytest.raises(ParityError, match="differs by 25 at batch size 1"):
        export_onnx(Clipped(100.0), tmp_path / "m.onnx", torch.zeros(1, 4), check_inputs=torch.full((3, 4), 75.0))


def test_a_file_that_onnxruntime_refuses_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.deploy.export._save", lambda exported, path: path.write_bytes(b"no ONNX"))
    with pytest.raises(ParityError, match="onnxruntime does not load it: InvalidProtobuf"):
        export_onnx(plain(), tmp_path / "m.onnx", torch.randn(1, 3, 8, 8))
    assert (tmp_path / "m.failed.onnx").read_bytes() == b"no ONNX"


def test_an_onnxruntime_for_cpus_alone_is_not_asked_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(InputError, match="onnxruntime cannot run on 'cuda' here"):
        open_session(Path("m.onnx"), "cuda")
    assert not recwarn.list


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_no_gpu_was_compared_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "compressor")
    found = export_onnx(plain(), tmp_path / "m.onnx", torch.randn(1, 3, 8, 8)).providers
    assert set(found) <= {"CPUExecutionProvider", "OpenVINO"}
    assert "is compared on the CPU only" in caplog.text


# -- the judge


def judged(ours: Tensor, theirs: Tensor) -> Parity:
    found = Parity()
    judge(found, ["output"], [ours], [theirs], "here")
    return found


def test_the_tolerance_is_a_share_of_the_scale() -> None:
    ours = torch.tensor([[200.0, 1.0], [-3.0, 50.0]])
    found = judged(ours, ours + torch.tensor([[0.0, 0.0195], [0.0, 0.0]]))
    assert (round(found.max_abs_difference, 3), round(found.relative, 6)) == (0.02, 9.8e-05)
    with pytest.raises(UnequalError, match=r"'output' differs by 0\.02\d* here, and 0\.02 is allowed"):
        judged(ours, ours + torch.tensor([[0.0, 0.0205], [0.0, 0.0]]))
    with pytest.raises(UnequalError, match="differs by nan"):
        judged(ours, torch.full_like(ours, torch.nan))
    with pytest.raises(UnequalError, match="differs by 1e-07 here, and 0 is allowed"):
        judged(torch.zeros(2, 2), torch.full((2, 2), 1e-7))
    with pytest.raises(UnequalError, match="differs by 1 here, and 0 is allowed"):
        judged(torch.tensor([10**6]), torch.tensor([10**6 + 1]))
    with pytest.raises(UnequalError, match=r"'output' has shape \(2, 1\) here, and the model's \(2, 2\)"):
        judged(ours, ours[:, :1])
    with pytest.raises(UnequalError, match="it gives 2 outputs here, and the model 1"):
        judge(Parity(), ["output"], [ours], [ours, ours], "here")
    assert (
        judged(torch.tensor([[torch.inf, -torch.inf, 1.0]]), torch.tensor([[torch.inf, -torch.inf, 1.0]])).relative == 0
    )


def test_the_top_class_must_be_the_same_unless_it_ties() -> None:
    tie = judged(torch.tensor([[1.0, 0.99995], [0.0, 1.0]]), torch.tensor([[0.99995, 1.0], [0.0, 1.0]]))
    assert tie.top1_agreement == 0.5
    with pytest.raises(UnequalError, match="'output' has another top-1 class for 1 of 2 examples here"):
        judged(torch.tensor([[1.0, 0.99985], [0.0, 1.0]]), torch.tensor([[0.99992, 0.99993], [0.0, 1.0]]))


def test_full_precision_is_asked_for_and_given_back() -> None:
    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cublas.allow_tf32
    try:
        cudnn.allow_tf32 = cublas.allow_tf32 = True
        with runtime.tf32_disabled():
            assert (cudnn.conv.fp32_precision, cublas.fp32_precision) == ("ieee", "ieee")
        assert (cudnn.allow_tf32, cublas.allow_tf32) == (True, True)
    finally:
        cudnn.allow_tf32, cublas.allow_tf32 = before


# -- what cannot be exported


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (
            FixedBatch(2),
            torch.randn(2, 3, 4, 4),
            r"^FixedBatch cannot .* its code fixes the batch size; write x\.flatten",
        ),
        (FixedBatch(4), torch.randn(4, 3, 4, 4), "does not run on two of the examples: RuntimeError: .*any batch size"),
        (nn.Linear(3, 3), torch.randn(1, 4), r"does not run on two .* give what model\(example_inputs\) takes"),
        (Branching(3, 3), torch.randn(1, 3), "torch.export does not follow it: .*data-dependent.*; change what"),
    ],
)
def test_a_model_that_cannot_be_exported_says_why(
    model: nn.Module, inputs: Tensor, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        export_onnx(model, tmp_path / "m.onnx", inputs)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_too_large_for_a_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "LARGEST_BYTES", 1000)
    with pytest.raises(ExportError, match=r"its weights take 0\.0 GB, and an ONNX file holds 2; make it smaller"):
        export_onnx(plain(), tmp_path / "m.onnx", torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("inputs", "check", "message"),
    [
        (torch.tensor(1.0), None, "example_inputs hold a tensor without dimensions: give tensors whose first"),
        ((torch.ones(2, 3), 5), None, "example_inputs hold a int at '1': give tensors whose first dimension"),
        ({"x": torch.ones(2, 3), "y": torch.ones(3, 3)}, None, r"have the batch sizes \[2, 3\]: give at least one"),
        (torch.ones(0, 3), None, r"example_inputs have the batch sizes \[0\]"),
        ((), None, r"example_inputs have the batch sizes \[\]"),
        (torch.ones(2, 3), torch.ones(0, 3), r"check_inputs have the batch sizes \[0\]"),
        (
            torch.ones(2, 3),
            torch.ones(2, 4),
            r"check_inputs hold torch\.float32 \(B, 4\), and example_inputs torch\.float32 \(B, 3\): give examples",
        ),
        ({"x": torch.ones(2, 3)}, {"y": torch.ones(2, 3)}, r"check_inputs hold y .*, and example_inputs x"),
    ],
)
def test_inputs_that_cannot_be_used_are_named(inputs: Any, check: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        export_onnx(nn.Linear(3, 3), tmp_path / "m.onnx", inputs, check_inputs=check)


def test_places_and_opsets_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    for opset in (17, 24):
        with pytest.raises(RangeError, match=f"opset = {opset} is out of range: give opset in 18 to 23"):
            export_onnx(nn.Linear(3, 3), tmp_path / "m.onnx", torch.ones(1, 3), opset=opset)
    with pytest.raises(InputError, match="there is no folder"):
        export_onnx(nn.Linear(3, 3), tmp_path / "nowhere" / "m.onnx", torch.ones(1, 3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_session_does_not_fall_back_to_the_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_onnx(nn.Linear(3, 3), tmp_path / "m.onnx", torch.ones(1, 3))
    with pytest.raises(InputError, match=r"onnxruntime cannot run on 'cuda' here .*: give device='cpu', or install"):
        open_session(tmp_path / "m.onnx", "cuda")
    assert capfd.readouterr() == ("", "")


# -- files


def test_a_file_is_there_in_full_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path) as part:
        part.write_text("old")
        assert not path.exists()
    with path.open() as reader:  # one who reads it goes on reading the old one
        with atomic_write(path) as part:
            part.write_text("new")
        assert (reader.read(), path.read_text()) == ("old", "new")
    assert list(tmp_path.iterdir()) == [path]


def test_half_a_file_is_taken_away(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_write(tmp_path / "file") as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


# -- other precisions, and tools that go on with the file


def deep(classes: int = 5) -> nn.Module:
    """Deep and wide enough that half precision shows in the fourth digit."""
    torch.manual_seed(0)
    blocks = [part for _ in range(6) for part in (nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(3, 32, 3), *blocks, nn.Flatten(), nn.Linear(32 * 36, classes)).eval()


def test_a_model_in_half_precision_is_held_to_the_digits_that_it_has(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    report = export_onnx(deep().half(), tmp_path / "m.onnx", x.half())
    assert 1e-4 < report.relative < 8 * torch.finfo(torch.float16).eps
    assert report.top1_agreement == 1


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_a_precision_that_onnxruntime_cannot_run_is_named(kind: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=rf"in {str(kind)[6:]}: export_onnx\(model.float\(\), ...\) may do"):
        export_onnx(deep().to(kind), tmp_path / "m.onnx", torch.zeros(2, 3, 8, 8, dtype=kind))


def test_a_model_that_computes_nan_is_not_proven(tmp_path: Path) -> None:
    model = plain()
    next(model.parameters()).data.fill_(torch.nan)
    with pytest.raises(ParityError, match="'output' of the model itself is NaN"):
        export_onnx(model, tmp_path / "m.onnx", torch.zeros(2, 3, 8, 8))


def test_onnxruntime_quantises_the_file(tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    x = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    export_onnx(deep(), tmp_path / "m.onnx", x)
    quantize_dynamic(tmp_path / "m.onnx", tmp_path / "q.onnx", weight_type=QuantType.QUInt8)
    (dense,), (small,) = run(tmp_path / "m.onnx", x), run(tmp_path / "q.onnx", x)
    assert (tmp_path / "q.onnx").stat().st_size < 0.5 * (tmp_path / "m.onnx").stat().st_size
    assert (dense - small).abs().max() < 0.1 * dense.abs().max()


def test_a_compiled_model_is_exported_as_what_it_is(tmp_path: Path) -> None:
    model = torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), backend="eager")
    assert export_onnx(model, tmp_path / "a.onnx", torch.randn(2, 3, 8, 8)).path.is_file()
