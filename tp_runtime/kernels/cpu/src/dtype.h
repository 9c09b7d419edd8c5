// Floating-point types of activations and caches.
#pragma once

namespace tp {

enum class Dtype { kFloat32, kBfloat16, kFloat16 };

}  // namespace tp
