"""Fused RMSNorm, SwiGLU and rotary embedding of a frozen target by liger-kernel, one launch each.

The code of a model family is not edited: `fuse_elementwise` replaces the `forward` of individual
modules of a loaded decoder from outside. A module is replaced only if

- its `forward` is still that of its class, so that no communication between ranks is bypassed;
- the fused operation agrees with it on small random inputs in the precision of the run, within the
  bound of `engine/kernels/self_check.py`. This check also tells the forms of RMSNorm apart. It
  rejects interleaved rotary embeddings, clamped activations and any other difference of a family.

Calls that the check did not cover (another precision, no rows) run the family's own code.

Shapes: R rows, D width of a norm, W width of an MLP; B batch, T tokens, H and G heads, E head dim.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from engine.kernels.check_cases import Case, draw
from engine.kernels.self_check import SelfCheck, check_kernel
from engine.parallel.norms import epsilon_of, required_epsilon

NORM, MLP, ROTARY = KINDS = ("RMSNorm", "SwiGLU", "rotary")
ROTATE = "apply_rotary_pos_emb"  # the function that attention modules of Transformers call
NUM_ROWS = 37
# For rows up to NARROW wide, liger-kernel uses another kernel from MANY_ROWS rows on.
NARROW = 256
MANY_ROWS = 8 * 4096
SCALES = (3.0, 30.0)  # of an MLP's inputs; the larger one reaches the limits of clamped activations
SETTINGS = (bool, int, float, str, tuple, list, type(None))
NOT_SETTINGS = {"training", "layer_idx", "layer_id"}
Sizes = frozenset[tuple[int, int]]  # (head dimension, width of the tables that rotate it)
Rotate = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class NormForm:
    """One form of RMSNorm: x / rms(x) * (offset + weight).

    casting: "llama" rounds x / rms(x) to the precision of x before the product with the weight,
    "gemma" rounds only the product.
    """

    offset: float
    casting: str


NORM_FORMS = (NormForm(0.0, "llama"), NormForm(0.0, "gemma"), NormForm(1.0, "gemma"))


@dataclass(frozen=True)
class FusedOperations:
    """Fused operations that replace those of a model family.

    rms_norm: takes x [..., D], weight [D], epsilon and form.
    swiglu: takes gate and up, and returns silu(gate) * up.
    rotate: takes queries [B, H, T, E], keys [B, G, T, E], cosines and sines, each [B or 1, T, up
    to E], and leaves them unchanged.
    """

    rms_norm: Callable[[Tensor, Tensor, float, NormForm], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def liger_operations() -> FusedOperations:
    """Return the operations of liger-kernel. Raises ImportError if it is not installed."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def rms_norm(x: Tensor, weight_D: Tensor, eps: float, form: NormForm) -> Tensor:
        return LigerRMSNormFunction.apply(x, weight_D, eps, form.offset, form.casting, False)

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        # Some versions of liger-kernel return further entries, which are not needed.
        rotated = LigerRopeFunction.apply(_to_overwrite(query), _to_overwrite(key), cos, sin)
        return rotated[0], rotated[1]

    return FusedOperations(rms_norm, LigerSiLUMulFunction.apply, rotate)


def _to_overwrite(x_BHTE: Tensor) -> Tensor:
    """Return a copy if liger-kernel would rotate in place; it copies other layouts itself."""
    is_in_place = x_BHTE.transpose(1, 2).is_contiguous()
    return x_BHTE.clone() if is_in_place else x_BHTE


@dataclass
class Fused:
    """Counts of replaced and refused modules by kind, and the first reason for refusal of each."""

    replaced: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, problem: str) -> None:
        """Count one module. problem: why it was refused; empty if it was replaced."""
        counts = self.refused if problem else self.replaced
        counts[kind] = counts.get(kind, 0) + 1
        if problem:
            self.reasons.setdefault(kind, problem)

    def summary(self) -> str:
        """Return a summary in one line for the run's log."""
        parts = [f"{kind} ({self.replaced[kind]})" for kind in KINDS if kind in self.replaced]
        text = ", ".join(parts) or "nothing replaced"
        for kind in KINDS:
            if kind in self.refused:
                count = self.refused[kind]
                text += f"; the family's own {kind} ({count}) is kept: {self.reasons[kind]}"
        return text


def use_liger(decoder: PreTrainedModel, dtype: torch.dtype, kernels: str, check: SelfCheck) -> str:
    """Replace the modules of a target with which liger-kernel agrees; returns a line for the log.

    This is a collective of all ranks on CUDA devices. Call it once after the target is loaded.
    dtype: precision of the target. kernels: the run's option; "reference" replaces nothing.
    """
    if kernels == "reference":
        return "nothing replaced, since kernels=reference"
    if check.device.type != "cuda":
        return "nothing replaced, since this is not a CUDA device"
    operations = None
    problem = ""
    try:
        operations = liger_operations()
    except ModuleNotFoundError:
        problem = "liger-kernel is not installed (pip install -e '.[gpu]')"
    except Exception as error:
        # Other versions may raise anything on import. The run works without liger-kernel too.
        problem = f"liger-kernel cannot be imported ({type(error).__name__}: {error})"
    (is_missing,) = check.any_rank([operations is None])
    if is_missing or operations is None:
        return f"nothing replaced, since {problem or 'another rank cannot import liger-kernel'}"
    return fuse_elementwise(decoder, dtype, check.device, operations, check.any_rank).summary()


def fuse_elementwise(
    decoder: PreTrainedModel,
    dtype: torch.dtype,
    device: torch.device,
    operations: FusedOperations,
    any_rank: Callable[[list[bool]], list[bool]] = list,
) -> Fused:
    """Replace those modules of `decoder` with which `operations` agree.

    any_rank: a collective that combines one flag per module, whether this rank refuses it, into
    whether any rank refuses it. With it, ranks that share a target compute in the same way.
    """
    checks = _Checks(operations, dtype, device)
    rotary = _Rotary(decoder, checks)
    found: list[_Candidate] = []
    with torch.no_grad():
        for module in decoder.modules():
            if "forward" in vars(module):
                continue
            if _is_norm(module, dtype):
                found.append(_check_norm(module, checks))
            elif _is_silu_mlp(module):
                found.append(_check_mlp(module, checks))
            elif rotary.is_called_by(module):
                found.append(rotary.check(module))
    flags = any_rank([bool(candidate.problem) for candidate in found]) if found else []
    fused = Fused()
    for candidate, is_refused in zip(found, flags, strict=True):
        problem = candidate.problem
        if is_refused and not problem:
            problem = "it was refused on another rank"
        fused.add(candidate.kind, problem)
        if not problem:
            candidate.replace()
    return fused


@dataclass(frozen=True)
class _Candidate:
    """A module to be replaced. problem: why it cannot be; empty if it can."""

    kind: str
    problem: str
    replace: Callable[[], None]


class _Checks:
    """Comparisons of fused operations with modules, one per distinct configuration of a module."""

    def __init__(self, operations: FusedOperations, dtype: torch.dtype, device: torch.device) -> None:
        self.operations = operations
        self.dtype = dtype
        self.device = device
        self._known: dict[object, object] = {}

    def problem(self, name: str, *cases: Case) -> str:
        """Return what is wrong with an operation; empty if it agrees in all cases."""
        return check_kernel(name, cases, self.device, self.dtype).message

    def once(self, key: object, compute: Callable[[], object]):
        """Return the result of `compute`, which is called once per key."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]


def _settings(module: nn.Module) -> tuple[object, ...]:
    """Return a module's class and plain attributes, which equally configured modules share."""
    found = vars(module).items()
    plain = [(name, repr(value)) for name, value in found if isinstance(value, SETTINGS)]
    return type(module), *sorted(pair for pair in plain if pair[0] not in NOT_SETTINGS)


def _takes_one_argument(module: nn.Module) -> bool:
    return len(inspect.signature(type(module).forward).parameters) == 2  # including self


def _is_norm(module: nn.Module, dtype: torch.dtype) -> bool:
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith(NORM) or not isinstance(weight, Tensor):
        return False
    # A weight of higher precision raises that of the result; liger-kernel keeps the input's.
    fits = weight.ndim == 1 and weight.dtype == dtype
    return fits and isinstance(epsilon_of(module), float) and _takes_one_argument(module)


def _check_norm(module: nn.Module, checks: _Checks) -> _Candidate:
    key = *_settings(module), module.weight.shape
    form, problem = checks.once(key, partial(_norm_form, module, checks))
    return _Candidate(NORM, problem, partial(_replace_norm, module, form, checks))


def _norm_form(module: Any, checks: _Checks) -> tuple[NormForm, str]:
    """Return the form of RMSNorm nearest to a module, and what is wrong with it; empty if nothing.

    Several forms can be within the bound: in 16 bits they differ by a rounding.
    """
    (width,) = module.weight.shape
    eps = required_epsilon(module)
    operations = checks.operations
    copies = -(-MANY_ROWS // NUM_ROWS) if width <= NARROW else 1
    leaves = draw(NUM_ROWS, width, seed=1), 1 + draw(width, seed=2, scale=0.25)

    def own(x_RD: Tensor, weight_D: Tensor) -> tuple[Tensor, ...]:
        return (functional_call(module, {"weight": weight_D}, (x_RD.repeat(copies, 1),)),)

    def fused(form: NormForm, x_RD: Tensor, weight_D: Tensor) -> tuple[Tensor, ...]:
        return (operations.rms_norm(x_RD.repeat(copies, 1), weight_D, eps, form),)

    problems = []
    distances = []
    for form in NORM_FORMS:
        case = Case(NORM, leaves, partial(fused, form), own, differentiates=False)
        problems.append(checks.problem(NORM, case))
        distance = float("inf")
        if not problems[-1]:
            on_device = [leaf.to(checks.device, checks.dtype) for leaf in leaves]
            difference = fused(form, *on_device)[0].double() - own(*on_device)[0].double()
            distance = difference.norm().item()
        distances.append(distance)
    best = distances.index(min(distances))
    return NORM_FORMS[best], problems[best]


def _replace_norm(module: Any, form: NormForm, checks: _Checks) -> None:
    own = module.forward
    eps = required_epsilon(module)
    rms_norm = checks.operations.rms_norm
    dtype = checks.dtype

    def forward(*arguments: Tensor, **named: Tensor) -> Tensor:
        (hidden,) = (*arguments, *named.values())
        if hidden.dtype != dtype or hidden.numel() == 0:
            return own(hidden)
        return rms_norm(hidden, module.weight, eps, form)

    module.forward = forward


class _Part(nn.Module):
    """A stand-in for a linear map that returns one half of its input's features, or all of them."""

    def __init__(self, place: int | None = None) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        return x if self.place is None else x.chunk(2, -1)[self.place]


def _is_silu_mlp(module: nn.Module) -> bool:
    children = dict(module.named_children())
    if not {"gate_proj", "up_proj", "down_proj"} <= set(children):
        return False
    is_silu = "SiLU" in type(getattr(module, "act_fn", None)).__name__
    return is_silu and _takes_one_argument(module)


def _check_mlp(module: nn.Module, checks: _Checks) -> _Candidate:
    weight = getattr(module.gate_proj, "weight", None)
    width = weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else 200
    key = *_settings(module), width
    problem = checks.once(key, partial(_mlp_problem, module, width, checks))
    return _Candidate(MLP, problem, partial(_replace_mlp, module, checks))


def _mlp_problem(module: nn.Module, width: int, checks: _Checks) -> str:
    """Compare SwiGLU with what an MLP computes between its linear maps; returns what is wrong."""
    between = type(module).__new__(type(module))
    vars(between).update(vars(module))
    stand_ins = {"gate_proj": _Part(0), "up_proj": _Part(1), "down_proj": _Part()}
    vars(between)["_modules"] = vars(module)["_modules"] | stand_ins

    def own(gate_RW: Tensor, up_RW: Tensor) -> tuple[Tensor, ...]:
        return (type(module).forward(between, torch.cat((gate_RW, up_RW), -1)),)

    def fused(gate_RW: Tensor, up_RW: Tensor) -> tuple[Tensor, ...]:
        return (checks.operations.swiglu(gate_RW, up_RW),)

    cases = []
    for scale in SCALES:
        leaves = [draw(NUM_ROWS, width, seed=seed, scale=scale) for seed in (1, 2)]
        cases.append(Case(MLP, tuple(leaves), fused, own, differentiates=False))
    return checks.problem(MLP, *cases)


def _replace_mlp(module: Any, checks: _Checks) -> None:
    swiglu = checks.operations.swiglu
    dtype = checks.dtype

    def forward(*arguments: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*arguments, *named.values())
        gate = module.gate_proj(x)
        up = module.up_proj(x)
        is_checked = gate.dtype == up.dtype == dtype and gate.numel() > 0
        inner = swiglu(gate, up) if is_checked else module.act_fn(gate) * up
        return module.down_proj(inner)

    module.forward = forward


class _Rotary:
    """The rotary embedding of a decoder's attention, which is a function of the modeling module.

    The function itself is not replaced, since other models in the process may call it. Instead,
    each attention module gets a copy of its `forward` in which the name of the function refers to
    the fused operation.
    """

    def __init__(self, decoder: PreTrainedModel, checks: _Checks) -> None:
        self._decoder = decoder
        self._checks = checks

    def is_called_by(self, module: nn.Module) -> bool:
        forward = type(module).forward
        if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
            return False
        return ROTATE in forward.__code__.co_names and ROTATE in forward.__globals__

    def check(self, module: nn.Module) -> _Candidate:
        head_dim = getattr(module, "head_dim", None)
        own = type(module).forward.__globals__[ROTATE]
        sizes, problem = self._checks.once((own, head_dim), partial(self._sizes, own, head_dim))
        return _Candidate(ROTARY, problem, partial(self._replace, module, own, sizes))

    def _sizes(self, own: Rotate, head_dim: object) -> tuple[Sizes, str]:
        """Return the sizes for which the operations agree, and what is wrong if there are none.

        Some functions rotate the first features of wider heads, others receive only those features.
        """
        widths = self._checks.once("tables", self._table_widths)
        if not widths:
            return frozenset(), "its tables are not two equal halves"
        agree: set[tuple[int, int]] = set()
        problems = []
        for width in sorted(widths):
            heads = {width, head_dim} if isinstance(head_dim, int) else {width}
            for head in sorted(heads):
                problem = self._checks.problem(ROTARY, self._case(own, head, width))
                if not problem:
                    agree.add((head, width))
                problems.append(problem)
        return frozenset(agree), "" if agree else problems[0]

    def _case(self, own: Rotate, head_dim: int, width: int) -> Case:
        num_heads = 4
        num_groups = 2
        shape = 2, NUM_ROWS  # documents and their tokens
        angle_BTE = draw(*shape, width // 2, seed=3).repeat(1, 1, 2)
        query_BTHE = draw(*shape, num_heads, head_dim, seed=1)
        key_BTGE = draw(*shape, num_groups, head_dim, seed=2)

        def run(rotate: Rotate, query, key, cos, sin) -> tuple[Tensor, ...]:
            # A family may read the arguments after rotating them, so they are compared as well.
            query = query.clone().transpose(1, 2)
            key = key.clone().transpose(1, 2)
            return *rotate(query, key, cos, sin), query, key

        leaves = query_BTHE, key_BTGE, angle_BTE.cos(), angle_BTE.sin()
        fused = partial(run, self._checks.operations.rotate)
        return Case(ROTARY, leaves, fused, partial(run, own), differentiates=False)

    def _table_widths(self) -> set[int]:
        """Return the widths of the decoder's tables; empty unless all repeat their first half."""
        widths = set()
        for cos, sin in self._tables():
            for table in (cos, sin):
                first, second = table.chunk(2, -1)
                if table.ndim != 3 or not torch.equal(first, second):
                    return set()
            widths.add(cos.shape[-1])
        return widths

    def _tables(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the cosines and sines of some positions; an unusable pair if they are not known."""
        device = self._checks.device
        x = torch.zeros(1, 1, 1, dtype=self._checks.dtype, device=device)
        position_1T = torch.arange(NUM_ROWS, device=device)[None]
        unknown = x.new_tensor([1.0, 0.0])
        kinds = dict.fromkeys(getattr(self._decoder.config, "layer_types", None) or ())
        for name, module in self._decoder.named_modules():
            if not name.endswith("rotary_emb"):
                continue
            takes_kind = "layer_type" in inspect.signature(type(module).forward).parameters
            for arguments in [(kind,) for kind in kinds] if takes_kind else [()]:
                try:
                    cos, sin = module(x, position_1T, *arguments)
                except Exception:
                    # It takes other arguments, or does not know this kind of layer.
                    cos = unknown
                    sin = unknown
                yield cos, sin

    def _replace(self, module: nn.Module, own: Rotate, sizes: Sizes) -> None:
        forward = type(module).forward
        key = "globals", id(forward.__globals__), sizes
        of_module = self._checks.once(key, partial(self._globals, forward.__globals__, own, sizes))
        rebuilt = FunctionType(
            forward.__code__,
            of_module,
            forward.__name__,
            forward.__defaults__,
            forward.__closure__,
        )
        rebuilt.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(rebuilt, module)

    def _globals(self, names: dict[str, Any], own: Rotate, sizes: Sizes) -> dict[str, Any]:
        """Return the globals of a modeling module, `names`, with its rotary function replaced."""
        fused_rotate = self._checks.operations.rotate
        dtype = self._checks.dtype

        def rotate(*arguments, **options) -> tuple[Tensor, Tensor]:
            is_checked = len(arguments) == 4 and options in ({}, {"unsqueeze_dim": 1})
            if is_checked and _is_rotatable(arguments, sizes, dtype):
                return fused_rotate(*arguments)
            return own(*arguments, **options)

        return names | {ROTATE: rotate}


def _is_rotatable(arguments: tuple[Any, ...], sizes: Sizes, dtype: torch.dtype) -> bool:
    """Return whether queries, keys and tables have precisions and sizes that were checked."""
    if not all(isinstance(x, Tensor) and x.dtype == dtype for x in arguments):
        return False
    query, key, cos, sin = arguments
    num_rows, _, num_tokens, head_dim = query.shape if query.ndim == 4 else (0, 0, 0, 0)
    if query.numel() == 0 or key.numel() == 0:
        return False
    width = cos.shape[-1]
    same = (num_rows, num_tokens, head_dim) == (key.shape[0], *key.shape[2:])
    tables = cos.shape in ((1, num_tokens, width), (num_rows, num_tokens, width))
    return same and tables and sin.shape == cos.shape and (head_dim, width) in sizes
