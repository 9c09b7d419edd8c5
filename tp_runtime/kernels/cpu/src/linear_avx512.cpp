#include "vector_avx512.h"
// The vectors come first: linear_kernel.h is written in their terms.
#include "linear_kernel.h"

namespace tp {

const LinearKernels linear_avx512 = {prepare, run};

}  // namespace tp
