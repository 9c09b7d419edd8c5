// The shared-memory collectives as torch sees them: ops that name their group by a string.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "group.h"

namespace tp {
namespace {

using at::Tensor;

std::mutex registry_mutex;
std::atomic<uint64_t> registry_version{0};  // changes with every group that comes or goes

std::unordered_map<std::string, std::shared_ptr<Group>>& registry() {
  static std::unordered_map<std::string, std::shared_ptr<Group>> groups;
  return groups;
}

// Each thread remembers the group it used last: a step's collectives all name the same one.
std::shared_ptr<Group> find(std::string_view name) {
  thread_local std::string last_name;
  thread_local std::weak_ptr<Group> last;
  thread_local uint64_t last_version = 0;
  if (last_version == registry_version.load(std::memory_order_acquire) && last_name == name) {
    if (std::shared_ptr<Group> group = last.lock()) return group;
  }
  const std::lock_guard<std::mutex> guard(registry_mutex);
  const auto found = registry().find(std::string(name));
  TORCH_CHECK(found != registry().end(), "group ", name, " is not attached to shared memory");
  last_name = name;
  last = found->second;
  last_version = registry_version.load(std::memory_order_relaxed);
  return found->second;
}

Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Element::kFloat32;
    case at::kBFloat16: return Element::kBfloat16;
    case at::kHalf: return Element::kFloat16;
    case at::kInt: return Element::kInt32;
    case at::kLong: return Element::kInt64;
    default: TORCH_CHECK(false, "all_reduce takes fp32, bf16, fp16, int32 and int64, not ", x.scalar_type());
  }
}

Reduction reduction_of(std::string_view name) {
  if (name == "sum") return Reduction::kSum;
  if (name == "max") return Reduction::kMax;
  TORCH_CHECK(name == "min", "all_reduce does sum, max and min, not ", name);
  return Reduction::kMin;
}

// torch's own error class for such things crosses into Python as torch.distributed.DistBackendError.
template <typename Action>
void run(const Action& action) {
  try {
    action();
  } catch (const CollectiveFailure& failure) {
    C10_THROW_ERROR(DistBackendError, failure.what);
  }
}

Tensor all_reduce(const Tensor& x, std::string_view reduction, std::string_view group) {
  const Tensor from = x.contiguous();
  Tensor out = at::detail::empty_cpu(from.sizes(), from.scalar_type());
  const auto shared = find(group);
  run([&] {
    shared->all_reduce(element_of(from), reduction_of(reduction), from.const_data_ptr(), out.data_ptr(),
                       static_cast<size_t>(from.numel()));
  });
  return out;
}

Tensor all_gather(const Tensor& x, int64_t world_size, std::string_view group) {
  const Tensor from = x.contiguous();
  auto sizes = from.sizes().vec();
  sizes.insert(sizes.begin(), world_size);
  Tensor out = at::empty(sizes, from.options());
  const auto shared = find(group);
  TORCH_CHECK(shared->size() == world_size, "group ", group, " has ", shared->size(), " ranks, not ", world_size);
  run([&] { shared->all_gather(from.const_data_ptr(), out.data_ptr(), from.nbytes()); });
  return out;
}

void broadcast_(Tensor& x, int64_t source, std::string_view group) {
  TORCH_CHECK(x.is_contiguous(), "broadcast_ wants a contiguous tensor");
  const auto shared = find(group);
  run([&] { shared->broadcast(x.data_ptr(), x.nbytes(), static_cast<int>(source)); });
}

void attach(std::string_view group, int64_t rank, const std::vector<std::string>& paths,
            const std::vector<int64_t>& pids, const std::vector<std::string>& names, double timeout_s) {
  std::shared_ptr<Group> made;
  try {
    made = std::make_shared<Group>(static_cast<int>(rank), paths, pids, names, timeout_s);
  } catch (const std::runtime_error& error) {
    TORCH_CHECK(false, error.what());
  }
  const std::lock_guard<std::mutex> guard(registry_mutex);
  registry()[std::string(group)] = std::move(made);
  ++registry_version;
}

void detach(std::string_view group) {
  const std::lock_guard<std::mutex> guard(registry_mutex);
  registry().erase(std::string(group));
  ++registry_version;
}

void give_up(std::string_view group, std::string_view reason) { find(group)->give_up(std::string(reason)); }

void set_timeout(std::string_view group, double timeout_s) { find(group)->set_timeout(timeout_s); }

void set_two_shot_bytes(std::string_view group, int64_t bytes) {
  find(group)->set_two_shot_bytes(static_cast<size_t>(bytes));
}

int64_t file_bytes(int64_t slot_bytes) {
  return static_cast<int64_t>(Group::file_bytes(static_cast<size_t>(slot_bytes)));
}

}  // namespace

TORCH_LIBRARY(tp_shm, m) {
  m.def("all_reduce(Tensor x, str reduction, str group) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("all_gather(Tensor x, int world_size, str group) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("broadcast_(Tensor(a!) x, int source, str group) -> ()", {at::Tag::pt2_compliant_tag});
  m.def("attach(str group, int rank, str[] paths, int[] pids, str[] names, float timeout_s) -> ()", &attach);
  m.def("detach(str group) -> ()", &detach);
  m.def("give_up(str group, str reason) -> ()", &give_up);
  m.def("set_timeout(str group, float timeout_s) -> ()", &set_timeout);
  m.def("set_two_shot_bytes(str group, int bytes) -> ()", &set_two_shot_bytes);
  m.def("file_bytes(int slot_bytes) -> int", &file_bytes);
}

TORCH_LIBRARY_IMPL(tp_shm, CPU, m) {
  m.impl("all_reduce", &all_reduce);
  m.impl("all_gather", &all_gather);
  m.impl("broadcast_", &broadcast_);
}

// Nothing here is differentiated: without these, torch's fallback for autograd runs before every call.
TORCH_LIBRARY_IMPL(tp_shm, AutogradCPU, m) {
  m.impl("all_reduce", torch::CppFunction::makeFallthrough());
  m.impl("all_gather", torch::CppFunction::makeFallthrough());
  m.impl("broadcast_", torch::CppFunction::makeFallthrough());
}

}  // namespace tp
