// Element-wise sums, maxima and minima over ranks, always in rank order, so that every rank that computes
// one gets the same bits. bf16 and fp16 are added in fp32 and rounded once.
#pragma once

#include <cstddef>

namespace tp {

enum class Element { kFloat32, kBfloat16, kFloat16, kInt32, kInt64 };
enum class Reduction { kSum, kMax, kMin };

size_t element_bytes(Element element);

// out[i] = sources[0][i] (+) sources[1][i] (+) ... ; `out` may be one of the sources.
void reduce(Element element, Reduction reduction, const void* const* sources, int num_sources, size_t count, void* out);

}  // namespace tp
