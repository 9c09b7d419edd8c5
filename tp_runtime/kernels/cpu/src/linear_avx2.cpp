#include "vector_avx2.h"
// The vectors come first: linear_kernel.h is written in their terms.
#include "linear_kernel.h"

namespace tp {

const LinearKernels linear_avx2 = {prepare, run};

}  // namespace tp
