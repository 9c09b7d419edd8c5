"""How a linear's weight divides: the one thing sharding and quantisation both know.

A weight is logical [N, K]: N output rows, K input columns. A rank holds rows [n0, n1) and columns
[k0, k1) of it. Group-wise formats share one scale among `group_size` consecutive columns, and groups
are those of the whole weight (group g covers columns g*group_size up to the next multiple, the last
one may be short), so that quantised values are the same at every world size. A shard that begins or
ends inside a group keeps that group's scale; so does its neighbour. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError


@dataclass(frozen=True)
class WeightFormat:
    """How the values of one weight are stored.

    bits: 4 or 8. group_size: columns that share a scale; None: one scale a row ("per channel").
    asymmetric: a group also has an offset (its minimum), w = scale * q + offset. is_float: values are
    float8_e4m3fn instead of integers.
    scale_bytes: bytes of one scale (and of one offset): 4 per channel (fp32), 2 per group (fp16).
    """

    name: str
    bits: int
    group_size: int | None = None
    asymmetric: bool = False
    is_float: bool = False

    @property
    def scale_bytes(self) -> int:
        return 4 if self.group_size is None else 2


FORMATS: dict[str, WeightFormat] = {
    "int8": WeightFormat("int8", 8),
    "fp8": WeightFormat("fp8", 8, is_float=True),
    "int8-g32": WeightFormat("int8-g32", 8, 32),
    "int4-g32": WeightFormat("int4-g32", 4, 32),
    "int4-g64": WeightFormat("int4-g64", 4, 64),
    "int4-g128": WeightFormat("int4-g128", 4, 128),
}
ALIASES = {"int4": "int4-g32"}


def weight_format(name: str, *, asymmetric: bool = False) -> WeightFormat | None:
    """The format called `name`; None for "none". Raises ConfigError for an unknown one."""
    if name == "none":
        return None
    found = FORMATS.get(ALIASES.get(name, name))
    if found is None:
        known = ", ".join(["none", *FORMATS, *ALIASES])
        raise ConfigError(f"quantisation {name!r} is not known; use one of: {known}")
    if asymmetric and found.bits == 4:
        return WeightFormat(found.name, found.bits, found.group_size, True)
    return found


@dataclass(frozen=True)
class WeightLayout:
    """The part [rows) x [cols) of a weight of logical shape [N, K] that is held here, and its format.

    shape: (N, K) of the whole weight. rows, cols: half-open ranges held here. format: None for plain
    floating point.
    """

    shape: tuple[int, int]
    rows: tuple[int, int]
    cols: tuple[int, int]
    format: WeightFormat | None = None

    def __post_init__(self) -> None:
        (n, k), (n0, n1), (k0, k1) = self.shape, self.rows, self.cols
        assert 0 <= n0 <= n1 <= n and 0 <= k0 <= k1 <= k, f"{self} lies outside its weight"

    @classmethod
    def whole(cls, shape: tuple[int, int], format: WeightFormat | None = None) -> WeightLayout:
        """The layout of a weight that is not divided."""
        return cls(shape, (0, shape[0]), (0, shape[1]), format)

    @property
    def local_shape(self) -> tuple[int, int]:
        """(rows, columns) held here."""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]

    @property
    def group_size(self) -> int:
        """Columns that share a scale; the whole K for a per-channel format."""
        assert self.format is not None, "plain weights have no groups"
        return self.format.group_size or self.shape[1]

    @property
    def groups(self) -> tuple[int, int]:
        """Half-open range of the whole weight's groups that this part touches."""
        size, (k0, k1) = self.group_size, self.cols
        return k0 // size, (-(-k1 // size) if k1 > k0 else k0 // size)

    @property
    def covering_cols(self) -> tuple[int, int]:
        """The columns of all groups that this part touches: what must be read to know their scales."""
        size, (g0, g1) = self.group_size, self.groups
        return min(g0 * size, self.shape[1]), min(g1 * size, self.shape[1])

    @property
    def head(self) -> int:
        """Columns of the first touched group that lie left of this part (0 where aligned)."""
        return self.cols[0] - self.groups[0] * self.group_size if self.cols[1] > self.cols[0] else 0

    def weight_bytes(self, dtype_bytes: int) -> int:
        """Bytes held here: values, scales and offsets (plain: dtype_bytes a value)."""
        n, k = self.local_shape
        if self.format is None:
            return n * k * dtype_bytes
        groups = self.groups[1] - self.groups[0]
        per_group = self.format.scale_bytes * (2 if self.format.asymmetric else 1)
        return n * (-(-k * self.format.bits // 8)) + n * groups * per_group
