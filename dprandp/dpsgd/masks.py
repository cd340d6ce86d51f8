"""What is trained: parameters by their names (``--train``, frozen blocks), adapters, or masks of single weights.

**Names** (``Trained``): all parameters, the head, norms and biases, or the last blocks. The others get no gradient, no
noise and no state of the optimizer, and stay as they are, to the byte. **Adapters** (Hu et al. 2021, arXiv 2106.09685;
Yu et al. 2022, arXiv 2110.06500, with DP-SGD): in the place of a matrix W, W + B A with trained factors of low rank;
the released model holds the sum.

**Masks** (Adamczewski & Park 2023, arXiv 2303.04612): *freeze* chooses once and trains only the chosen weights;
*select* makes another choice every R steps. The gradient of a record is multiplied by the mask *before* its norm is
taken, and so is the noisy sum: a Gaussian mechanism in as many dimensions as there are chosen weights.

**Frozen blocks** get no gradient: below the first trained block nothing is back-propagated or stored, and with one view
per example the input of that block is computed once per image and kept.

Guarantee:
    A choice depends on private data only through earlier releases: on the public seed, on public weights, or (select)
    on parameters after noisy updates. A masked gradient is no longer than the whole one, so the sensitivity is that of
    ``privacy.clipping``; dropping noisy coordinates is post-processing. A mask made from private gradients would be a
    further release that is not charged, so it is refused. The kept output of a frozen block is a function of its
    record's pixels alone, and is used for that record's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dprandp.config.schema import FinetuneConfig, public_arch
from dprandp.errors import UsageError, nearest
from dprandp.models.classifier import Classifier
from dprandp.models.precision import autocast
from dprandp.models.wrn import has_layer_gradients
from dprandp.runs.results import ALL_WEIGHTS

EXTRACTOR, HEAD = "extractor.", "head"
"""Beginning of the names of the extractor's parameters in the classifier, and the other parameter."""

CRITERIA, PRUNES = ("random", "magnitude"), ("hold", "zero")
SCOPES = ("global", "layer", "block")
DEFAULT_EVERY = 10
HOW = {"random": "at random from a public seed", "magnitude": "by magnitude", "last": "from the head's end"}

Masks = dict[str, Tensor]
"""Tensor name -> bool, of its shape: which weights are trained. A tensor not named is trained whole."""


@dataclass(frozen=True)
class MaskRule:
    """The rule of choice; public."""

    mode: str  # 'freeze' or 'select'
    criterion: str  # 'random' or 'magnitude'; for blocks also 'last'
    keep: float  # part of the weights that is chosen, in (0, 1)
    scope: str  # 'global' or 'layer', of what it is a part; 'block' for whole blocks (see ``choose_blocks``)
    every: int  # steps between two choices of select
    seed: int  # public randomness
    zero: bool  # weights that freeze does not choose become zero

    def due(self, step: int) -> bool:
        """Whether the choice changes at this step."""
        return self.mode == "select" and step > 0 and step % self.every == 0

    def choose(self, parameters: Mapping[str, Tensor], step: int) -> Masks:
        """The matrices and filters of the extractor that are trained from a step on, on their device.

        ⌊keep · n + ½⌋ of the n weights are chosen, at least one; of equal magnitudes the first.

        Args:
            parameters: all that are trained: public ones for freeze, released ones for select.
        """
        of = {name: value for name, value in parameters.items() if name.startswith("extractor.") and value.ndim >= 2}
        if not of:
            raise UsageError("no weight of the extractor is trained, so none can be chosen", fix="leave --keep out")
        random = np.random.default_rng([self.seed, step])
        scores = {
            name: torch.from_numpy(random.random(tuple(value.shape)))
            if self.criterion == "random"
            else value.detach().abs().double().cpu()
            for name, value in of.items()
        }
        if self.scope == "layer":
            masks = {name: _largest(score.flatten(), self.keep) for name, score in scores.items()}
        else:
            together = _largest(torch.cat([score.flatten() for score in scores.values()]), self.keep)
            parts = together.split([score.numel() for score in scores.values()])
            masks = dict(zip(scores, parts, strict=True))
        return {name: mask.view(of[name].shape).to(of[name].device) for name, mask in masks.items()}

    def in_words(self, masks: Masks) -> str:
        """The text for the disclosure."""
        chosen, of = sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
        when = "once, before the training" if self.mode == "freeze" else f"every {self.every} steps"
        after = "" if self.mode == "select" else "; the others are zero" if self.zero else "; the others stay"
        return (
            f"{chosen:,} of {of:,} weights of the extractor, chosen {HOW[self.criterion]} {when}{after}; and head, "
            "norms, biases"
        )


def rule_of(config: FinetuneConfig) -> MaskRule | None:
    """The rule of a configuration; None if every weight is trained.

    Raises:
        UsageError: values out of range, or settings that contradict each other or would do nothing.
    """
    for name in ("freeze", "select"):
        if getattr(config, name) == "gradient":
            raise UsageError(
                f"--{name} gradient is refused: a mask made from the private gradients would be a further release "
                "about the data, which epsilon does not count",
                fix=f"give --{name} random, or --{name} magnitude: both cost nothing",
            )
    blocks = config.scope == "block"
    freeze = (*CRITERIA, "last") if blocks else CRITERIA
    if config.freeze == "last" and not blocks:
        raise UsageError("--freeze last chooses whole blocks", fix="give --scope block with it")
    for name, known in (("freeze", freeze), ("select", CRITERIA), ("scope", SCOPES), ("prune", PRUNES)):
        value = getattr(config, name)
        if value is not None and value not in known:
            raise UsageError(f"--{name} {value!r} is unknown", fix=nearest(value, known))
    if config.freeze is not None and config.select is not None:
        raise UsageError("--freeze and --select exclude each other", fix="give one of them")
    kind, _ = train_of(config)
    criterion = config.freeze or config.select
    if criterion is not None and config.train is not None:
        raise UsageError("--train and --freeze or --select exclude each other", fix="give one of them")
    if config.extractor_scale == 0 and kind not in ("all", "head"):
        raise UsageError(f"extractor_scale = 0 freezes what --train {config.train} names", fix="leave one of them out")
    if (criterion is None) != (config.keep is None):
        problem = "--keep needs --freeze or --select" if criterion is None else "--freeze and --select need --keep"
        raise UsageError(problem, fix="give --freeze or --select, and --keep with it, such as --keep 0.1")
    for name, wanted in (("prune", "freeze"), ("every", "select"), ("scope", "keep")):
        if getattr(config, name) is not None and getattr(config, wanted) is None:
            raise UsageError(f"--{name} needs --{wanted}, which was not given", fix=f"give --{wanted} too")
    if criterion is None:
        return None
    if not 0 < config.keep < 1:
        raise UsageError(f"--keep {config.keep:g} lies outside (0, 1)", fix="give a fraction such as --keep 0.1")
    if config.every is not None and not 1 <= config.every <= 10**9:
        raise UsageError(f"--every {config.every} is not a number of steps", fix="give 1 or more")
    if blocks and config.select is not None:
        raise UsageError("--select chooses single weights, not blocks", fix="give --freeze with --scope block")
    if blocks and config.prune == "zero":
        raise UsageError("a network without whole blocks computes nothing", fix="give --prune hold with --scope block")
    if config.extractor_scale == 0:
        raise UsageError("extractor_scale = 0 freezes the whole extractor", fix="leave it out, or --keep")
    mode, scope, every = "freeze" if config.freeze else "select", config.scope or "global", config.every
    return MaskRule(mode, criterion, config.keep, scope, every or DEFAULT_EVERY, config.seed, config.prune == "zero")


@torch.no_grad()
def apply(masks: Masks, tensors: Mapping[str, Tensor]) -> None:
    """Set weights that are not chosen to zero, in place; [B, ...] tensors of a batch are masked row by row."""
    for name, mask in masks.items():
        tensors[name].mul_(mask)


def _largest(scores: Tensor, keep: float) -> Tensor:
    """bool [n]: the largest scores; of equal ones the first."""
    count = max(1, math.floor(keep * len(scores) + 0.5))
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[torch.sort(scores, descending=True, stable=True).indices[:count]] = True
    return mask


# ---------------------------------------------------------------------------------------- parameters, by their names

CACHE_BYTES = 2**30
"""Bytes of outputs of frozen blocks that are kept; others are computed again."""

FORWARD_VIEWS = 64
"""Views in one pass of the frozen blocks."""

ROWS, COLUMNS = ".lora_a", ".lora_b"
"""Added to the name of a matrix W: its adapter's factors, A [r, inputs] and B [outputs, r]; W + B A takes its place."""

ADAPTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
"""Layers whose matrices get adapters; a convolution's filters are the rows of one."""


@dataclass(frozen=True)
class Trained:
    """The parameters of a classifier that are trained; public."""

    names: frozenset[str] | None = None  # None: all
    first: int = 0  # of the extractor's units, how many come before the first trained one and are left out of a step
    rank: int = 0  # of adapters; 0: the parameters themselves are trained
    words: str = ALL_WEIGHTS  # for the disclosure

    def trains(self, name: str) -> bool:
        """Whether a parameter of the classifier is trained (of an adapted one: through its adapter)."""
        return self.names is None or name in self.names

    def start(self, model: Classifier, seed: int) -> dict[str, Tensor]:
        """The trained parameters of a model as they begin, by name; an adapter begins as zero (A random, B zero)."""
        own = {name: value.detach().clone() for name, value in model.named_parameters() if self.trains(name)}
        if not self.rank:
            return own
        generator, made = torch.Generator().manual_seed(seed), {}
        for name, value in own.items():
            if name == HEAD:
                made[name] = value
                continue
            outputs, inputs = value.flatten(1).shape
            rank = min(self.rank, outputs, inputs)
            rows = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
            made |= {name + ROWS: rows.to(value), name + COLUMNS: value.new_zeros(outputs, rank)}
        return made


def merged(base: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of a classifier by their own names: those of adapters W + B A, the others as they are.

    Args:
        base: the classifier's parameters, W among them. trained: as ``Trained.start`` names them.
    """
    own = {name: value for name, value in trained.items() if not name.endswith((ROWS, COLUMNS))}
    for name in trained:
        if name.endswith(ROWS):
            matrix = name.removesuffix(ROWS)
            change = trained[matrix + COLUMNS] @ trained[name]
            own[matrix] = base[matrix] + change.view_as(base[matrix])
    return own


def train_of(config: FinetuneConfig) -> tuple[str, int]:
    """``--train`` as a kind ('all', 'head', 'norm-bias', 'last' or 'lora') and its number (0 where it has none).

    Raises:
        UsageError: another spelling.
    """
    kind, colon, number = (config.train or ALL_WEIGHTS).partition(":")
    if kind in ("all", "head", "norm-bias") and not colon:
        return kind, 0
    if kind in ("last", "lora") and number.isascii() and number.isdecimal() and 1 <= int(number[:9]) == int(number):
        return kind, int(number)
    raise UsageError(
        f"--train {config.train!r} is unknown",
        fix="give all, head, norm-bias, last:N or lora:R, such as --train last:1",
    )


def chosen(config: FinetuneConfig, model: Classifier) -> tuple[Trained, MaskRule | None]:
    """What a configuration trains of a model: parameters, and the rule for masks of single weights in these, if any.

    Raises:
        UsageError: the network has no such parameters, or as ``rule_of``.
    """
    rule = rule_of(config)
    if rule is not None and rule.scope == "block":
        return choose_blocks(rule, model), None
    return choose_parameters(config, model), rule


def choose_parameters(config: FinetuneConfig, model: Classifier) -> Trained:
    """The parameters that ``--train`` names.

    Raises:
        UsageError: the network has no such parameters.
    """
    kind, number = train_of(config)
    names = [name for name, _ in model.named_parameters()]
    arch = public_arch(model.extractor.built_from.arch)
    if kind == "all":
        return Trained()
    if kind == "head":
        return Trained(frozenset({HEAD}), words="the head only")
    if kind == "last":
        return _last_blocks(number, model, arch)
    if kind == "norm-bias":
        own = [name for name in names if name.endswith("bias")]
        for path, layer in model.named_modules():
            if isinstance(layer, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm | nn.modules.instancenorm._InstanceNorm):
                own += [f"{path}.{name}" for name, _ in layer.named_parameters(recurse=False)]
        said = "norms and biases"
    else:
        own = [
            f"{path}.{name}" for path, layer in model.named_modules() if isinstance(layer, ADAPTED)
            for name, value in layer.named_parameters(recurse=False) if value.ndim >= 2
        ]  # fmt: skip
        said = f"low-rank adapters (rank {number}) of {len(own)} linear and convolution layers"
    if not own:
        what = "norms or biases" if kind == "norm-bias" else "linear or convolution layers"
        raise UsageError(f"{arch} has no {what} for --train {config.train}", fix="give --train head or --train all")
    return Trained(frozenset({*own, HEAD}), rank=number, words=f"{said}, and the head; nothing else")


def _last_blocks(count: int, model: Classifier, arch: str) -> Trained:
    """The last blocks, with all that comes after the first of them."""
    blocks = blocks_of(model.extractor)
    if count >= len(blocks):
        raise UsageError(
            f"{arch} has {len(blocks)} block{'s' * (len(blocks) != 1)}, so --train last:{count} leaves none out",
            fix="give --train all or head" if len(blocks) < 2 else f"give at most last:{len(blocks) - 1}, or all",
        )
    names = [name for name, _ in model.extractor.named_parameters()]
    begins = next(place for place, name in enumerate(names) if name.startswith(f"{blocks[-count]}."))
    # a layer-by-layer network leaves out the work below
    units = [] if not has_layer_gradients(model.extractor) or model.extractor.reads_earlier_stages else blocks
    return Trained(
        frozenset({HEAD, *(f"{EXTRACTOR}{name}" for name in names[begins:])}),
        first=max(0, len(units) - count),
        words=f"the last {count} of {len(blocks)} blocks of the extractor (from {blocks[-count]} on), and the head",
    )


def after_the_blocks(model: Classifier) -> Trained:
    """The head, and the extractor's parameters after its last block: its last norm, where it has one."""
    blocks = blocks_of(model.extractor)
    names = [name for name, _ in model.extractor.named_parameters()]
    inside = [place for place, name in enumerate(names) if blocks and name.startswith(f"{blocks[-1]}.")]
    units = [] if not has_layer_gradients(model.extractor) or model.extractor.reads_earlier_stages else blocks
    own = names[max(inside) + 1 :] if inside else []
    return Trained(frozenset({HEAD, *(f"{EXTRACTOR}{name}" for name in own)}), first=len(units))


def blocks_of(network: nn.Module) -> list[str]:
    """Names of a network's blocks, in the order in which it declares them.

    A block is a part with weights of two dimensions or more, looked for in the network's children, in sequences, and in
    modules that hold sequences of equal blocks. Of a ResNet: the first convolution, then each residual block.
    """
    if hasattr(network, "units"):
        return [name for name, _ in network.units()]
    return [name for name, part in _parts(network, "") if any(value.ndim >= 2 for value in part.parameters())]


def _parts(network: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in network.named_children():
        inside = [child, *child.children()]
        if type(child) in SEQUENCES or any(map(_repeats, inside)) or (not prefix and name == "network"):
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


SEQUENCES = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _repeats(module: nn.Module) -> bool:
    """Whether a module is a sequence of two or more equal blocks."""
    kinds = [type(child) for child in module.children()]
    return isinstance(module, SEQUENCES) and len(kinds) > 1 and len(set(kinds)) == 1


def choose_blocks(rule: MaskRule, model: Classifier) -> Trained:
    """The blocks that a rule with scope 'block' trains: ⌊keep · n + ½⌋ of stem and residual blocks, at least one.

    Args:
        rule: criterion 'random' (by the public seed), 'magnitude' (largest mean |θ|), or 'last' (nearest to the head).
        model: as it starts, made of public things.
    """
    if not has_layer_gradients(model.extractor):
        raise UsageError("this network has no blocks to freeze", fix="give --train last:N, --scope layer, or a wrn")
    if model.extractor.reads_earlier_stages:
        raise UsageError(
            "this network's features come from earlier blocks too, so none of them can be left out",
            fix="give --scope global or layer, or an extractor made with feature_stages = last",
        )
    units = model.extractor.units()
    count = max(1, int(rule.keep * len(units) + 0.5))
    if rule.criterion == "random":
        scores = np.random.default_rng([rule.seed, 0]).random(len(units))
    elif rule.criterion == "magnitude":
        weights = [torch.cat([p.detach().flatten() for p in unit.parameters() if p.ndim >= 2]) for _, unit in units]
        scores = np.array([float(each.abs().double().mean()) for each in weights])
    else:
        scores = np.arange(len(units))
    trained = set(np.argsort(-scores, kind="stable")[:count].tolist())
    frozen = tuple(f"{EXTRACTOR}{name}." for place, (name, _) in enumerate(units) if place not in trained)
    return Trained(
        frozenset(name for name, _ in model.named_parameters() if not name.startswith(frozen)),
        first=min(trained),
        words=f"{count} of {len(units)} blocks of the extractor (stem and residual blocks), chosen "
        f"{HOW[rule.criterion]} once before the training, are trained, with the layers after them and the head; "
        "others are not",
    )


class FrozenPrefix:
    """The ``first`` ≥ 1 units of a model's extractor, frozen; ``keep`` their outputs where views never change."""

    def __init__(self, model: Classifier, first: int, keep: bool) -> None:
        self.model, self.first, self._keep = model, first, keep
        self._kept: dict[int, Tensor] = {}
        self._room = CACHE_BYTES

    @torch.no_grad()
    def outputs(self, views: Tensor, members: Tensor) -> Tensor:
        """The input of the first trained block, float32 [B, K, ...], for views uint8 [B, K, 3, 32, 32].

        Args:
            members: int64 [B] on the CPU, positions in the data set, by which outputs are kept.
        """
        places = members.tolist()
        missing = [row for row, place in enumerate(places) if place not in self._kept]
        made: dict[int, Tensor] = {}
        step = max(1, FORWARD_VIEWS // views.shape[1])
        for start in range(0, len(missing), step):
            rows = missing[start : start + step]
            out = self._forward(views[rows].flatten(0, 1)).unflatten(0, (len(rows), views.shape[1]))
            made |= dict(zip(rows, out.unbind(0), strict=True))
        found = [made[row] if row in made else self._kept[place] for row, place in enumerate(places)]
        for row, value in made.items():
            size = value.numel() * value.element_size()
            if self._keep and size <= self._room:
                self._kept[places[row]] = value.clone()  # a copy: a row would keep its whole block in memory
                self._room -= size
        return torch.stack(found) if found else self._forward(views.new_zeros(1, *views.shape[2:]))[None][:0]

    def _forward(self, images: Tensor) -> Tensor:
        extractor = self.model.extractor
        with autocast(extractor, images.device):
            out = extractor.normalise(images)
            for _, unit in extractor.units()[: self.first]:
                out = unit(out)
        return out.float()
