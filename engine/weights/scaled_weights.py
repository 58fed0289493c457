"""Checkpoints of ModelOpt and compressed-tensors in NVFP4 or fp8 with a scale per tensor or row.

The format of a weight follows from the names of its scales, so a checkpoint may mix both formats
and weights that are not quantised.

    fp8      weight = code * scale
    NVFP4    weight = value(code) * block scale * global scale, in blocks of 16 inputs

Sources: ModelOpt's unified Hugging Face checkpoint; compressed-tensors' `float-quantized` and
`nvfp4-pack-quantized`.
"""

from collections.abc import Iterator

from torch import Tensor

from engine.parallel.rules import ShardSpec
from engine.weights.quantised_weight import QuantisedWeight
from engine.weights.weight_reader import Checkpoint, own_part

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 = (*E2M1, *(-value for value in E2M1))
PER_BYTE = 2  # values of 4 bits
NVFP4_BLOCK = 16  # inputs that share a scale

SCALES = ("_scale", "_scale_inv")  # appended to the name of a weight; both multiply the codes
GLOBAL_SCALE = "_scale_2"  # ModelOpt: weights are multiplied by it
GLOBAL_DIVISOR = "_global_scale"  # compressed-tensors: scales are divided by it
PACKED = "_packed"  # compressed-tensors' name for 4-bit codes
OF_INPUTS = ("input_scale", "input_global_scale", "input_scale_ub", "activation_scale")
OF_CACHE = (".k_scale", ".v_scale", ".q_scale")
NOT_WEIGHTS = (*OF_INPUTS, *OF_CACHE)


class ScaledCheckpoint(Checkpoint):
    """A checkpoint with weights in fp8 or NVFP4.

    A weight NAME in fp8 has a scale `NAME_scale` or `NAME_scale_inv`, with one value in total, per
    output row or per expert.
    A weight in NVFP4 is stored as NAME or `NAME_packed`, uint8 [out, in / 2], with the first of two
    values in the lower half of a byte. It has block scales `NAME_scale` in fp8, [out, in / 16], and
    one global scale in fp32: `NAME_scale_2`, or its inverse `NAME_global_scale`.
    Scales of activations and of the cache are ignored, because hidden states are computed from
    unquantised activations.
    """

    def __init__(self, path: str, revision: str | None) -> None:
        """Open the checkpoint and find the scales of each weight.

        Raises ValueError, naming the tensor, if the codes and scales of a weight do not fit
        together.
        """
        super().__init__(path, revision)
        self._scales: dict[str, str] = {}
        self._globals: dict[str, str] = {}
        for name in self._by_name:
            stem = name.removesuffix(PACKED)
            scale = self._first_of(stem, SCALES)
            if scale is None or stem.endswith(SCALES):
                continue
            self._scales[stem] = scale
            over_all = self._first_of(stem, (GLOBAL_SCALE, GLOBAL_DIVISOR))
            if over_all is not None:
                self._globals[stem] = over_all
        for stem in self._scales:
            self._check(stem)

    def _first_of(self, stem: str, suffixes: tuple[str, ...]) -> str | None:
        return next((stem + suffix for suffix in suffixes if stem + suffix in self._by_name), None)

    def _codes_name(self, stem: str) -> str:
        return stem if stem in self._by_name else stem + PACKED

    def _is_nvfp4(self, stem: str) -> bool:
        return stem in self._globals

    def _check(self, stem: str) -> None:
        codes = self._codes_name(stem)
        scale = self._scales[stem]
        stored = self.stored_dtype(codes), self.stored_dtype(scale)
        rows = super().shape(codes)
        scale_rows = super().shape(scale)
        if self._is_nvfp4(stem):
            blocks = -(-rows[-1] * PER_BYTE // NVFP4_BLOCK)
            is_one = super().shape(self._globals[stem]) in ([], [1])
            if stored == ("U8", "F8_E4M3") and len(rows) == 2 and scale_rows == [rows[0], blocks] and is_one:
                return
            wanted = "U8 codes [out, in / 2] with F8_E4M3 scales [out, in / 16] and one global scale"
        else:
            fitting = _shapes_of_scale(rows)
            if stored[0] == "F8_E4M3" and stored[1] in ("F32", "BF16", "F16") and scale_rows in fitting:
                return
            wanted = "F8_E4M3 codes with a float scale per tensor, output row or expert"
        found = f"{stored[0]} codes of shape {rows} with {stored[1]} scales of shape {scale_rows}"
        problem = f"{codes}: expected {wanted}; found {found}"
        raise ValueError(f"target.path={self.path}: {problem}. Name a bfloat16 checkpoint")

    def __iter__(self) -> Iterator[str]:
        beside = {*self._scales.values(), *self._globals.values()}
        for name in super().__iter__():
            if name not in beside and not name.endswith(NOT_WEIGHTS):
                yield name.removesuffix(PACKED)

    def shape(self, name: str) -> list[int]:
        codes = super().shape(self._codes_name(name))
        if name in self._scales and self._is_nvfp4(name):
            codes[-1] *= PER_BYTE
        return codes

    def stored_dtype(self, name: str) -> str:
        return super().stored_dtype(self._codes_name(name))

    def is_understood(self, name: str) -> bool:
        return name in self._scales or super().is_understood(self._codes_name(name))

    def read(self, name: str, cut: ShardSpec | None = None) -> Tensor:
        if name not in self._scales:
            return super().read(name, cut)
        codes = super().read(self._codes_name(name))
        scale = super().read(self._scales[name]).float()
        if not self._is_nvfp4(name):
            return own_part(_fp8(codes, scale), cut)
        over_all = super().read(self._globals[name]).float()
        is_divisor = self._globals[name].endswith(GLOBAL_DIVISOR)
        scale = scale / over_all if is_divisor else scale * over_all
        weight = QuantisedWeight(codes, scale, (1, NVFP4_BLOCK), meanings=FP4, packing=(1, PER_BYTE))
        return own_part(weight, cut)


def _shapes_of_scale(weight: list[int]) -> list[list[int]]:
    """Return the allowed shapes of an fp8 weight's scale: one value, or one per row or expert."""
    one = [[], [1], [1] * len(weight)]
    if len(weight) == 3:
        return [*one, weight[:1], [weight[0], 1, 1]]
    return [*one, weight[:1], [weight[0], 1]]


def _fp8(codes: Tensor, scale: Tensor) -> QuantisedWeight:
    """Return a quantised weight with one scale in total, or one per index of dimension 0.

    codes: [out, in], or [experts, ..., ...].
    """
    if scale.numel() == 1 and codes.ndim == 2:
        return QuantisedWeight(codes, scale.view(1, 1), codes.shape)
    if scale.numel() == 1:
        scale = scale.view(1).expand(codes.shape[0])
    scale = scale.reshape(codes.shape[0], *(1 for _ in codes.shape[1:])).contiguous()
    return QuantisedWeight(codes, scale, (1, *codes.shape[1:]))
