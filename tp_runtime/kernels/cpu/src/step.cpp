// All layers of one step in one op, so that nothing but kernels lies between kernels: one token of a small
// model passes hundreds of them, each a few microseconds long, and Python would cost as much again.
//
// A plan holds a rank's layers (weights packed, norms, caches) and is run on the residual stream, fp32 [T, E].
// It does what models/llama.py does through the engine's modules, which are its slow twin.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "cache_write.h"
#include "ops.h"
#include "torch_dtype.h"

namespace tp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int kLanes = 16;            // partial sums, so that the compiler may use vectors
constexpr int64_t kGrainTokens = 16;  // tokens below which a second thread costs more than it brings

struct Weight {
  Tensor packed;
  OptionalTensor channel_scale, bias;
  int64_t n, k, bits, group_size, head;
  bool asymmetric, gated, round_activations;
};

struct Layer {
  Tensor input_norm, post_norm;
  OptionalTensor q_norm, k_norm;
  std::vector<int64_t> qkv, gate_up;  // one weight that does all, or three and two
  int64_t o, down;
  OptionalTensor o_bias;  // added once, after the ranks' sum
  Tensor keys, values;
  OptionalTensor key_scales, value_scales;  // of an int8 cache
  int64_t window;
};

struct Plan {
  double eps, scale;
  int64_t head_dim, q_size, kv_size;
  std::string all_reduce, group;  // the op's name, empty for one rank
  Tensor final_norm;
  std::vector<Weight> weights;
  std::vector<Layer> layers;
};

std::mutex plans_mutex;
std::unordered_map<int64_t, std::shared_ptr<Plan>> plans;

std::shared_ptr<Plan> plan_at(int64_t handle) {
  const std::lock_guard<std::mutex> lock(plans_mutex);
  const auto found = plans.find(handle);
  TORCH_CHECK(found != plans.end(), "there is no step plan ", handle);
  return found->second;
}

// ---- between the kernels ----------------------------------------------------------------------------

__attribute__((target_clones("avx512f", "avx2", "default"))) void normalise(const float* x, const float* weight,
                                                                            int64_t size, float eps, float* out) {
  float partial[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) partial[lane] += x[i + lane] * x[i + lane];
  }
  float sum = 0;
  for (float part : partial) sum += part;
  for (; i < size; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(size) + eps);
  for (i = 0; i < size; ++i) out[i] = x[i] * scale * weight[i];
}

__attribute__((target_clones("avx512f", "avx2", "default"))) void add_to(float* x, const float* y, int64_t size) {
  for (int64_t i = 0; i < size; ++i) x[i] += y[i];
}

// One head turned by its token's angles (models/rope.py).
__attribute__((target_clones("avx512f", "avx2", "default"))) void turn(float* x, const float* cos, const float* sin,
                                                                       int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float left = x[i], right = x[half + i];
    x[i] = left * cos[i] - right * sin[i];
    x[half + i] = right * cos[half + i] + left * sin[half + i];
  }
}

__attribute__((target_clones("avx512f", "avx2", "default"))) void gate(const float* up, int64_t size, float* x) {
  for (int64_t i = 0; i < size; ++i) x[i] = x[i] / (1.0f + std::exp(-x[i])) * up[i];
}

template <typename Each>
void for_tokens(int64_t tokens, const Each& each) {
  at::parallel_for(0, tokens, kGrainTokens, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) each(t);
  });
}

Tensor normed(const Tensor& x, const Tensor& weight, double eps) {
  Tensor out = at::empty_like(x);
  const int64_t size = x.size(1);
  const float *from = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  for_tokens(x.size(0), [&](int64_t t) { normalise(from + t * size, w, size, static_cast<float>(eps), to + t * size); });
  return out;
}

Tensor apply(const Weight& w, const Tensor& x) {
  Tensor y = linear(x, w.packed, w.channel_scale, w.n, w.k, w.bits, w.group_size, w.head, w.asymmetric, w.gated,
                    w.round_activations);
  if (w.bias) {
    const float* bias = w.bias->const_data_ptr<float>();
    float* to = y.data_ptr<float>();
    for_tokens(y.size(0), [&](int64_t t) { add_to(to + t * w.n, bias, w.n); });
  }
  return y;
}

Tensor summed(const Plan& plan, const Tensor& x) {
  if (plan.all_reduce.empty()) return x;
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(plan.all_reduce.c_str(), "")
      .typed<Tensor(const Tensor&, std::string_view, std::string_view)>()
      .call(x, "sum", plan.group);
}

void add_residual(Tensor& x, const Tensor& y, const OptionalTensor& bias) {
  const int64_t size = x.size(1);
  float* to = x.data_ptr<float>();
  const float* from = y.const_data_ptr<float>();
  for_tokens(x.size(0), [&](int64_t t) {
    add_to(to + t * size, from + t * size, size);
    if (bias) add_to(to + t * size, bias->const_data_ptr<float>(), size);
  });
}

// ---- a layer ----------------------------------------------------------------------------------------

// What the step says of its tokens: fp32 cos and sin [T, D], int64 slots [T], and the rows of attention.
struct Tokens {
  const Tensor &cos, &sin, &slots, &block_table, &query_start, &context_lens;
};

// A token's heads in q, k or v: `stride` floats a token.
struct Heads {
  float* data;
  int64_t stride, count;
};

// Norm (where the model has one) and turn the heads of one token.
void prepare_heads(const Plan& plan, const Heads& heads, int64_t t, const OptionalTensor& norm, const Tokens& tokens) {
  const int64_t dim = plan.head_dim;
  const float *cos = tokens.cos.const_data_ptr<float>() + t * dim, *sin = tokens.sin.const_data_ptr<float>() + t * dim;
  for (int64_t h = 0; h < heads.count; ++h) {
    float* head = heads.data + t * heads.stride + h * dim;
    if (norm) normalise(head, norm->const_data_ptr<float>(), dim, static_cast<float>(plan.eps), head);
    turn(head, cos, sin, dim / 2);
  }
}

void write_heads(const Tensor& cache, const OptionalTensor& scales, const Heads& heads, int64_t t, int64_t slot) {
  const float* token = heads.data + t * heads.stride;
  for (int64_t h = 0; h < heads.count; ++h) write_cached(cache, scales, h, slot, token + h * cache.size(3));
}

Tensor attend(const Plan& plan, Layer& layer, const Tensor& x, const Tokens& tokens) {
  std::vector<Tensor> made;
  for (int64_t weight : layer.qkv) made.push_back(apply(plan.weights[weight], x));
  const int64_t dim = plan.head_dim, count = x.size(0), kv_heads = plan.kv_size / dim;
  const bool joined = made.size() == 1;
  const auto heads = [&](int part, int64_t offset, int64_t size) {
    Tensor& y = made[joined ? 0 : part];
    return Heads{y.data_ptr<float>() + (joined ? offset : 0), y.size(1), size / dim};
  };
  const Heads q = heads(0, 0, plan.q_size), k = heads(1, plan.q_size, plan.kv_size),
              v = heads(2, plan.q_size + plan.kv_size, plan.kv_size);
  TORCH_CHECK(layer.keys.size(1) == kv_heads, "the cache holds ", layer.keys.size(1), " heads, not ", kv_heads);
  const int64_t* slots = tokens.slots.const_data_ptr<int64_t>();
  const int64_t limit = layer.keys.size(0) * layer.keys.size(2);
  for_tokens(count, [&](int64_t t) {
    TORCH_CHECK(slots[t] >= 0 && slots[t] < limit, "slot ", slots[t], " lies outside the cache");
    prepare_heads(plan, q, t, layer.q_norm, tokens);
    prepare_heads(plan, k, t, layer.k_norm, tokens);
    write_heads(layer.keys, layer.key_scales, k, t, slots[t]);
    write_heads(layer.values, layer.value_scales, v, t, slots[t]);
  });
  const Tensor queries = made[0].narrow(1, 0, plan.q_size).view({count, -1, dim});
  return paged_attention(queries, layer.keys, layer.values, tokens.block_table, tokens.query_start,
                         tokens.context_lens, plan.scale, layer.window, layer.key_scales, layer.value_scales)
      .view({count, plan.q_size});
}

Tensor gated(const Plan& plan, const Layer& layer, const Tensor& x) {
  Tensor y = apply(plan.weights[layer.gate_up[0]], x);
  if (layer.gate_up.size() == 1) return y;
  const Tensor up = apply(plan.weights[layer.gate_up[1]], x);
  const int64_t size = y.size(1);
  for_tokens(y.size(0), [&](int64_t t) {
    gate(up.const_data_ptr<float>() + t * size, size, y.data_ptr<float>() + t * size);
  });
  return y;
}

void check_step(const Plan& plan, const Tensor& x, const Tokens& tokens) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == at::kFloat, "the stream is fp32 [T, E]");
  for (const Tensor& angle : {tokens.cos, tokens.sin}) {
    TORCH_CHECK(angle.is_contiguous() && angle.scalar_type() == at::kFloat &&
                    angle.numel() == x.size(0) * plan.head_dim,
                "cos and sin are fp32 [T, D]");
  }
  TORCH_CHECK(tokens.slots.is_contiguous() && tokens.slots.scalar_type() == at::kLong &&
                  tokens.slots.numel() == x.size(0),
              "slots are int64 [T]");
}

// Runs every layer and the last norm. x is changed in place; what is returned is normed.
Tensor step_run(int64_t handle, Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& slots,
              const Tensor& block_table, const Tensor& query_start, const Tensor& context_lens) {
  const std::shared_ptr<Plan> plan = plan_at(handle);
  const Tokens tokens{cos, sin, slots, block_table, query_start, context_lens};
  check_step(*plan, x, tokens);
  for (Layer& layer : plan->layers) {
    const Tensor attended = attend(*plan, layer, normed(x, layer.input_norm, plan->eps), tokens);
    add_residual(x, summed(*plan, apply(plan->weights[layer.o], attended)), layer.o_bias);
    const Tensor inner = gated(*plan, layer, normed(x, layer.post_norm, plan->eps));
    add_residual(x, summed(*plan, apply(plan->weights[layer.down], inner)), std::nullopt);
  }
  return normed(x, plan->final_norm, plan->eps);
}

// ---- building a plan --------------------------------------------------------------------------------

void check_floats(const OptionalTensor& vector, int64_t size) {
  TORCH_CHECK(!vector || (vector->is_contiguous() && vector->scalar_type() == at::kFloat && vector->numel() == size),
              "norms and biases are fp32, one number a column");
}

int64_t step_new(const Tensor& final_norm, double eps, double scale, int64_t head_dim, int64_t num_heads,
                 int64_t num_kv_heads, std::string_view all_reduce, std::string_view group) {
  check_floats(final_norm, final_norm.numel());
  TORCH_CHECK(head_dim % 2 == 0, "a head of ", head_dim, " cannot be turned by halves");
  static int64_t next = 0;
  const std::lock_guard<std::mutex> lock(plans_mutex);
  plans[next] = std::make_shared<Plan>(Plan{eps, scale, head_dim, num_heads * head_dim, num_kv_heads * head_dim,
                                            std::string(all_reduce), std::string(group), final_norm, {}, {}});
  return next++;
}

void step_free(int64_t handle) {
  const std::lock_guard<std::mutex> lock(plans_mutex);
  plans.erase(handle);
}

int64_t step_add_weight(int64_t handle, const Tensor& packed, const OptionalTensor& channel_scale,
                        const OptionalTensor& bias, int64_t n, int64_t k, int64_t bits, int64_t group_size,
                        int64_t head, bool asymmetric, bool gated, bool round_activations) {
  check_floats(bias, n);
  auto plan = plan_at(handle);
  plan->weights.push_back(
      Weight{packed, channel_scale, bias, n, k, bits, group_size, head, asymmetric, gated, round_activations});
  return static_cast<int64_t>(plan->weights.size()) - 1;
}

void step_add_layer(int64_t handle, const Tensor& input_norm, const Tensor& post_norm, const OptionalTensor& q_norm,
                    const OptionalTensor& k_norm, at::IntArrayRef qkv, int64_t o, const OptionalTensor& o_bias,
                    at::IntArrayRef gate_up, int64_t down, const Tensor& keys, const Tensor& values,
                    const OptionalTensor& key_scales, const OptionalTensor& value_scales, int64_t window) {
  auto plan = plan_at(handle);
  TORCH_CHECK((qkv.size() == 1 || qkv.size() == 3) && (gate_up.size() == 1 || gate_up.size() == 2),
              "q, k and v are one weight or three, gate and up one or two");
  check_floats(input_norm, input_norm.numel());
  check_floats(post_norm, input_norm.numel());
  check_floats(o_bias, input_norm.numel());
  check_scales(keys, key_scales);
  check_scales(values, value_scales);
  check_floats(q_norm, plan->head_dim);
  check_floats(k_norm, plan->head_dim);
  plan->layers.push_back(
      Layer{input_norm, post_norm, q_norm, k_norm, qkv.vec(), gate_up.vec(), o, down, o_bias, keys, values,
            key_scales, value_scales, window});
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(tp_cpu, m) {
  m.def(
      "step_new(Tensor final_norm, float eps, float scale, int head_dim, int num_heads, int num_kv_heads, "
      "str all_reduce, str group) -> int");
  m.def("step_free(int plan) -> ()", &step_free);
  m.def(
      "step_add_weight(int plan, Tensor packed, Tensor? channel_scale, Tensor? bias, int n, int k, int bits, "
      "int group_size, int head, bool asymmetric, bool gated, bool round_activations) -> int");
  m.def(
      "step_add_layer(int plan, Tensor input_norm, Tensor post_norm, Tensor? q_norm, Tensor? k_norm, int[] qkv, "
      "int o, Tensor? o_bias, int[] gate_up, int down, Tensor keys, Tensor values, Tensor? key_scales, "
      "Tensor? value_scales, int window) -> ()");
  m.def(
      "step_run(int plan, Tensor(a!) x, Tensor cos, Tensor sin, Tensor slots, Tensor block_table, "
      "Tensor query_start, Tensor context_lens) -> Tensor");
}

TORCH_LIBRARY_IMPL(tp_cpu, CPU, m) {
  m.impl("step_new", &step_new);
  m.impl("step_add_weight", &step_add_weight);
  m.impl("step_add_layer", &step_add_layer);
  m.impl("step_run", &step_run);
}

}  // namespace tp
