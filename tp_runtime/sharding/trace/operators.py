"""Which ATen operation belongs to which class, and which torch functions take sizes. Names are torch's."""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Results whose elements are copies of elements of the operands.
COPIES = _names(
    "cat stack clone contiguous repeat roll flip tril triu unfold _to_copy lift_fresh_copy view_copy "
    "slice_copy select_copy expand_copy permute_copy split_copy unbind_copy diagonal_copy "
    "constant_pad_nd index index_select gather take_along_dim repeat_interleave reflection_pad1d "
    "replication_pad1d unsafe_split narrow_copy"
)
BY_INDEX = _names("index index_select gather take_along_dim repeat_interleave")
# Results that depend on all elements along some dimensions: without those dimensions, and with them.
REDUCTIONS = _names(
    "sum mean amax amin var std logsumexp max min prod argmax argmin any all norm linalg_vector_norm "
    "var_mean std_mean median count_nonzero"
)
ALONG = _names("_softmax _log_softmax _safe_softmax cumsum cumprod sort topk logcumsumexp cummax cummin")
NORMS = _names("native_layer_norm _fused_rms_norm")
SPATIAL = _names(
    "avg_pool2d max_pool2d_with_indices _adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d "
    "upsample_bicubic2d upsample_nearest1d avg_pool1d"
)
# Element-wise operations that torch does not tag as pointwise.
POINTWISE = _names("complex polar masked_fill where rsub hardswish dropout bernoulli copysign")
WRITES = _names(
    "index_add index_copy index_put _index_put_impl scatter scatter_add scatter_reduce slice_scatter "
    "select_scatter"
)
NEW = _names("zeros ones full empty new_zeros new_ones new_full new_empty")
# Operations that commute with a sum over ranks (some under conditions: see `Trace._stays_linear`).
LINEAR = _names(
    "mul div neg sum mean _to_copy clone cat stack add sub index gather index_select index_add index_put "
    "_index_put_impl index_copy scatter_add constant_pad_nd copy masked_fill where cumsum new_zeros "
    "zeros_like slice_scatter select_scatter repeat flip roll empty_like new_empty ones_like"
)
JOINING = _names(
    "cat stack index_add index_put _index_put_impl index_copy scatter_add copy slice_scatter select_scatter"
)
# Operations that read the shape of an operand, and none of its values.
SHAPE_ONLY = _names(
    "zeros_like new_zeros empty_like new_empty ones_like new_ones full_like new_full rand_like randn_like"
)
# torch functions and methods whose integer arguments are sizes of the result.
TAKE_SIZES = _names(
    "view reshape expand zeros ones empty full new_zeros new_empty new_ones new_full rand randn broadcast_to"
)
