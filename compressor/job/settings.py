"""Everything that can be asked of a run: the options of the command line, checked, and written to `config.toml`.

One frozen dataclass is the single list of options: the command line, the TOML file and the library read it. What is
left open (`None`) is filled in from the other options, so that a `Settings` says in full what will happen.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import InputError, UnknownNameError
from compressor.job.checks import OBSERVING, check, masking

if TYPE_CHECKING:
    from compressor.budget import Limits

_KINDS: dict[Any, str] = {
    str: "text in quotes",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list[str]: 'a list of texts, ["layer1.*"]',
}


def _option(default: Any, panel: str, text: str, shown: str = "") -> Any:
    """Give a dataclass field with its heading, its help text, and what to show as default where it is worked out."""
    return field(default=default, metadata={"panel": panel, "help": text, "shown": shown})


def _typed_with(option: str) -> Any:
    """Give a dataclass field that has no option of its own: its values are typed along with another's."""
    return field(default=(), metadata={"typed_with": option})


@dataclass(frozen=True)
class Settings:
    """The options of one run; a wrong one is refused when the object is made.

    Raises:
        UnknownNameError: a criterion, measure, scope, ... that does not exist.
        RangeError: a number outside its range.
        InputError: options that contradict each other, or would have no effect.
    """

    criterion: str = _option("relevance", "What", "relevance (watches training), magnitude, set, rigl, l1, l2, ...")
    model: str = _option("resnet18", "What", "A torchvision classifier, or package.module:factory.")
    stem: str = _option("imagenet", "What", "imagenet, or cifar for small images.")
    weights: str = _option("", "What", "Begin with the weights in this .safetensors, .pt or .pth file.", "random")
    data: str = _option("digits", "What", "digits, cifar10, cifar100, or imagefolder:PATH.")
    download: bool = _option(False, "What", "Download the data set if it is not there.")

    sparsity: float = _option(
        0.6, "How much", "Fraction to remove, in [0, 1); PATTERN=0.3 beside it: of the channels of these groups."
    )
    sparsity_by_pattern: tuple[str, ...] = _typed_with("sparsity")
    measure: str = _option("params", "How much", "Of what: params, macs or channels.")
    scope: str = _option("local", "How much", "Rank each group by itself (local), or all channels together (global).")
    round_to: int = _option(8, "How much", "Round channel counts to multiples of this.")
    keep: tuple[str, ...] = _option((), "How much", "Groups that stay whole, by PATTERN; may be repeated.", "none")
    only: tuple[str, ...] = _option((), "How much", "The groups that may lose channels; may be repeated.", "all")

    compensate: str | None = _option(
        None, "Cuts", "Fold a removed channel's mean into the next layer, or none.", "mean"
    )
    recalibrate: int | None = _option(
        None, "Cuts", "Images for BatchNorm statistics anew after a cut; 0: none.", "2000 with --when after, else 0"
    )
    verify: bool = _option(True, "Cuts", "Compare every cut with the silenced model on real images.")

    when: str | None = _option(
        None, "Training", "Prune during or after training.", "during for relevance, magnitude, set, rigl; else after"
    )
    epochs: int = _option(24, "Training", "Epochs of training.")
    finetune_epochs: int | None = _option(
        None, "Training", "Epochs after the cut, with --when after.", "half of --epochs"
    )
    batch_size: int = _option(64, "Training", "Images in one training step.")
    lr: float = _option(0.05, "Training", "Highest learning rate.")
    collect: int | None = _option(
        None,
        "Training",
        "Training steps between two cuts, or two changes of masks.",
        "a twentieth of the training; 100 for rigl, an epoch for set",
    )

    granularity: str | None = _option(None, "Masks", "What magnitude, set and rigl mask: weight or channel.", "weight")
    allocation: str | None = _option(
        None, "Masks", "How sparse each layer is: erk, uniform, or global (magnitude).", "erk; uniform for magnitude"
    )

    relevance_estimator: str | None = _option(None, "Relevance", "gate, soft, mixed, loss or source.", "gate")
    drop: float | None = _option(None, "Relevance", "Share of channels drawn in each sample, in (0, 0.5].", "0.05")
    observe_every: int | None = _option(
        None,
        "Relevance",
        "Training steps of which one draws channels.",
        "8, or less where --collect is short; 1 for loss and source",
    )
    delta: float | None = _option(None, "Relevance", "Channels whose p is above this are cut last, in (0, 1].", "0.99")
    dummies: int | None = _option(None, "Relevance", "Channels of no effect to compare with, 10 or more.", "100")
    warmup: int | None = _option(
        None, "Relevance", "Steps over which --drop rises from 0.", "a twentieth of the training, 0 for source"
    )

    seed: int = _option(0, "Run", "Seed of everything that draws.")
    device: str = _option("auto", "Run", "cpu, cuda, cuda:1, ..., or auto: a GPU if there is one.")
    out: str = _option("", "Run", "The run folder.", "runs/MODEL-DATA-CRITERION-SPARSITY")

    def __post_init__(self) -> None:
        """Check, and work out what was left open."""
        check(self)
        self.limits()
        for name, value in _worked_out(self).items():
            object.__setattr__(self, name, value)

    @staticmethod
    def of(given: Mapping[str, Any], source: str = "") -> Settings:
        """Make settings from option names as typed (`round-to`) and their values; all others take their defaults.

        Args:
            given: values by option name.
            source: the file they are from, for messages.

        Raises:
            UnknownNameError: an option that does not exist; says which is close.
            InputError: a value of the wrong kind.
        """
        hints = option_kinds()
        where = f" in {source}" if source else ""
        number, patterns = _sparsities(given["sparsity"], where) if "sparsity" in given else ([], [])
        given = {name: value for name, value in given.items() if name != "sparsity"}
        for name, value in [*given.items(), *(("sparsity", each) for each in number)]:
            if name not in hints:
                raise UnknownNameError(f"option{where}", name, hints)
            if not _fits(value, hints[name]):
                raise InputError(f"{name} = {value!r}{where}: give {_KINDS[hints[name]]}")
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
        }
        plain |= {"sparsity-by-pattern": tuple(patterns)} | ({"sparsity": number[0]} if number else {})
        return Settings(**{name.replace("-", "_"): value for name, value in plain.items()})

    def given(self) -> dict[str, Any]:
        """Give every option that has a value, by its name as typed; `Settings.of` takes it back."""
        values = {name: getattr(self, name.replace("-", "_")) for name in option_kinds()}
        if self.sparsity_by_pattern:
            values["sparsity"] = [self.sparsity, *self.sparsity_by_pattern]
        listed = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {name: value for name, value in listed.items() if value is not None}

    def limits(self) -> Limits:
        """Give what the options say about single groups."""
        from compressor.budget import Limits  # imports torch

        shares: dict[str, float] = {}
        for word in self.sparsity_by_pattern:
            pattern, _, share = word.rpartition("=")
            if shares.setdefault(pattern, float(share)) != float(share):
                raise InputError(
                    f"--sparsity {pattern} came with {shares[pattern]:g} and {share}: leave one of them out"
                )
        return Limits(self.keep, self.only, shares)

    def toml(self) -> str:
        """Give the text of `config.toml`: one line for each option."""
        return "".join(f"{name} = {_toml_value(value)}\n" for name, value in self.given().items())

    def command(self) -> str:
        """Give the shortest line to type that makes these settings."""
        named = {name: self.given()[name] for name in ("criterion", "model", "data", "sparsity")}
        usual = Settings.of({**named, "when": self.when}).given()
        named |= {name: value for name, value in self.given().items() if value != usual.get(name)}
        words = [word for name, value in named.items() for word in _words(name, value)]
        return shlex.join(["compress", *words])


def read_toml(path: Path) -> dict[str, Any]:
    """Give the options that a TOML file holds, by name as typed.

    Raises:
        InputError: the file is missing or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; give a file with lines like: sparsity = 0.6"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is no TOML: {error}; give a file with lines like: sparsity = 0.6") from error


def option_kinds() -> dict[str, type]:
    """Give the type of every option, by its name as typed."""
    hints = typing.get_type_hints(Settings)
    own = [item.name for item in dataclasses.fields(Settings) if "typed_with" not in item.metadata]
    return {name.replace("_", "-"): _kind(hints[name]) for name in own}


def _kind(hint: Any) -> Any:
    """Give the type without None; a tuple is given as a list."""
    if typing.get_origin(hint) is tuple:
        return list[str]
    return typing.get_args(hint)[0] if typing.get_args(hint) else hint


def _sparsities(value: Any, where: str) -> tuple[list[Any], list[str]]:
    """Take apart what may be one number, or a list of one number at most and of `PATTERN=NUMBER`, also as typed."""
    words = value if isinstance(value, list) else [value]
    patterns = [word for word in words if isinstance(word, str) and "=" in word]
    numbers = [_number(word) if isinstance(value, list) else word for word in words if word not in patterns]
    for word in patterns:
        share = _number(word.rpartition("=")[2])
        if not isinstance(share, float) or not 0 <= share < 1:
            raise InputError(
                f"sparsity = {word!r}{where}: give PATTERN=NUMBER with a number in [0, 1), layer4.*=0.3 say"
            )
    if len(numbers) > 1:
        raise InputError(f"sparsity = {numbers}{where}: give one number, and PATTERN=NUMBER for single groups")
    return numbers, patterns


def as_written(words: list[str]) -> Any:
    """Give the values of `--sparsity` as `config.toml` holds them: a number, or a list with the number first."""
    values = sorted((_number(word) for word in words), key=lambda value: isinstance(value, str))
    return values[0] if len(values) == 1 else values


def _number(word: Any) -> Any:
    """Give a typed number as such, everything else as it is."""
    try:
        return float(word) if isinstance(word, str) else word
    except ValueError:
        return word


def _worked_out(settings: Settings) -> dict[str, Any]:
    """Give what the options that were left open come to."""
    observing, masked = settings.criterion == OBSERVING, masking(settings.criterion)
    when = settings.when or ("during" if observing or masked else "after")
    opened: dict[str, Any] = {
        "when": when,
        "device": usable_device(settings.device),
        "out": settings.out or _folder(settings),
    }
    if when == "after":
        opened["finetune_epochs"] = (
            (settings.epochs + 1) // 2 if settings.finetune_epochs is None else settings.finetune_epochs
        )
    if not masked:
        usual: dict[str, Any] = {"compensate": "mean", "recalibrate": 2000 if when == "after" else 0}
        opened |= {name: value for name, value in usual.items() if getattr(settings, name) is None}
    if observing:
        usual = {"relevance_estimator": "gate", "drop": 0.05, "delta": 0.99, "dummies": 100}
        opened |= {name: value for name, value in usual.items() if getattr(settings, name) is None}
    if masked:
        usual = {"granularity": "weight", "allocation": "uniform" if settings.criterion == "magnitude" else "erk"}
        opened |= {name: value for name, value in usual.items() if getattr(settings, name) is None}
    return opened


def _folder(settings: Settings) -> str:
    parts = (settings.model, settings.data.rstrip("/").rpartition("/")[2], settings.criterion, f"{settings.sparsity:g}")
    return "runs/" + "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", part).strip("._") for part in parts)


def usable_device(name: str) -> str:
    """Give the device to compute on; `auto` becomes a GPU where there is one.

    Raises:
        UnknownNameError, InputError: there is no such device, here or anywhere.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    known = ["cpu", "cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name not in known:
        raise UnknownNameError("device", name, [*known, "auto"])
    if name != "cpu" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: this machine has no usable GPU; give --device cpu")
    return name


def _fits(value: Any, kind: type) -> bool:
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [word for each in (value if isinstance(value, list) else [value]) for word in (f"--{name}", str(each))]


def _toml_value(value: Any) -> str:
    """Give a value as TOML; its strings are JSON's, but for one control character that JSON leaves bare."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
