// Functions of 16 lanes, over the vectors of vector_avx512.h or vector_avx2.h, whichever came before.
#pragma once

#include <initializer_list>

namespace tp {
namespace {

// e^x within 2 units in the last place, for x in [-87, 88]; beyond, its value at the end.
inline Floats exponential(Floats x) {
  x = smallest(largest(x, spread(-87.0f)), spread(88.0f));
  const Floats n = round_to_whole(mul(x, spread(1.44269504f)));
  Floats r = fma(n, spread(-0.693359375f), x);
  r = fma(n, spread(2.12194440e-4f), r);
  Floats p = spread(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1.0f, 1.0f}) {
    p = fma(p, r, spread(c));
  }
  return mul(p, power_of_two(n));
}

inline Floats silu(Floats x) {
  const Floats one = spread(1.0f);
  return div(x, add(one, exponential(mul(x, spread(-1.0f)))));
}

}  // namespace
}  // namespace tp
