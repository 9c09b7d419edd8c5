#include "vector_avx512.h"
// The vectors come first: attention_kernel.h is written in their terms.
#include "attention_kernel.h"

namespace tp {

const AttentionKernels attention_avx512 = {run_attention, combine, read_vectors};

}  // namespace tp
