#include "group.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <stdexcept>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tp {

struct Page {
  alignas(64) std::atomic<uint64_t> arrived;  // the operation this rank has put its data of in place
  alignas(64) std::atomic<uint64_t> reduced;  // the operation it has put its reduced part of in place
  alignas(64) std::atomic<uint32_t> gave_up;  // 1: an operation failed here; the group is of no more use
};

namespace {

constexpr size_t kPageBytes = 4096;
constexpr int kSpins = 200;              // some 5 to 10 us
constexpr double kYieldSeconds = 0.02;   // then sleep
constexpr double kCheckSeconds = 0.02;   // between looks at whether the peer lives
constexpr long kSleepNanoseconds = 100'000;
constexpr size_t kTwoShotBytes = 1 << 13;  // benchmarks/two_shot.py; docs/log.md has the figures

static_assert(sizeof(Page) <= kPageBytes && std::atomic<uint64_t>::is_always_lock_free);

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

int open_process(int64_t pid) {
#ifdef SYS_pidfd_open
  return static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(pid), 0));
#else
  return -1;
#endif
}

// A process descriptor becomes readable when its process ends, reaped or not.
bool has_ended(int process) {
  pollfd waiting{process, POLLIN, 0};
  return process >= 0 && poll(&waiting, 1, 0) == 1;
}

// Gives the core away: at first for a turn, later for longer. Returns the time.
double pause_since(double started) {
  sched_yield();
  const double time = now();
  if (time - started > kYieldSeconds) {
    const timespec pause{0, kSleepNanoseconds};
    nanosleep(&pause, nullptr);
  }
  return time;
}

size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

size_t Group::file_bytes(size_t slot_bytes) { return kPageBytes + 2 * slot_bytes; }

Group::Group(int rank, const std::vector<std::string>& paths, const std::vector<int64_t>& pids,
             const std::vector<std::string>& names, double timeout_s)
    : rank_(rank), peers_(paths.size()), sources_(paths.size()), two_shot_bytes_(kTwoShotBytes), timeout_s_(timeout_s) {
  for (size_t r = 0; r < paths.size(); ++r) {
    Peer& peer = peers_[r];
    const int file = open(paths[r].c_str(), O_RDWR | O_CLOEXEC);
    if (file < 0) throw std::runtime_error(paths[r] + ": " + std::strerror(errno));
    struct stat status {};
    fstat(file, &status);
    peer.mapped_bytes = static_cast<size_t>(status.st_size);
    void* memory = mmap(nullptr, peer.mapped_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    const int error = errno;
    close(file);
    if (memory == MAP_FAILED) throw std::runtime_error(paths[r] + ": " + std::strerror(error));
    peer.page = static_cast<Page*>(memory);
    peer.slots = static_cast<uint8_t*>(memory) + kPageBytes;
    const size_t slot_bytes = (peer.mapped_bytes - kPageBytes) / 2;
    slot_bytes_ = r == 0 || slot_bytes < slot_bytes_ ? slot_bytes : slot_bytes_;
    peer.pid = pids[r];
    peer.name = names[r];
    if (static_cast<int>(r) != rank_) peer.process = open_process(pids[r]);
  }
  // A file lies on its rank's NUMA node. Of two ranks each writes into the other's file, where the only reader
  // finds it on its own node. More ranks have several readers: docs/decisions/0004.
  if (size() == 2) std::swap(peers_[0].slots, peers_[1].slots);
}

Group::~Group() {
  for (const Peer& peer : peers_) {
    if (peer.page != nullptr) munmap(peer.page, peer.mapped_bytes);
    if (peer.process >= 0) close(peer.process);
  }
}

uint8_t* Group::slot(int peer, uint64_t number) const { return peers_[peer].slots + number % 2 * slot_bytes_; }

uint64_t Group::begin(const char* operation) {
  if (!failure_.empty()) throw CollectiveFailure{failure_};
  operation_ = operation;
  return ++number_;
}

void Group::arrive(uint64_t number) { peers_[rank_].page->arrived.store(number, std::memory_order_release); }

void Group::give_up(const std::string& reason) {
  const std::lock_guard<std::mutex> guard(mutex_);
  end(reason);
}

void Group::end(const std::string& reason) {
  failure_ = reason;
  peers_[rank_].page->gave_up.store(1, std::memory_order_release);
}

void Group::fail(const std::string& what) {
  end(what);
  throw CollectiveFailure{what};
}

template <typename Reached>
void Group::await(int peer, const Reached& reached) {
  for (int i = 0; i < kSpins; ++i) {
    if (reached()) return;
    relax();
  }
  const double started = now();
  double checked = started;
  while (!reached()) {
    const double time = pause_since(started);
    if (time - checked < kCheckSeconds) continue;
    checked = time;
    const std::string trouble = trouble_with(peer, time - started);
    // A peer may have done its part and ended since the last look.
    if (!trouble.empty() && !reached()) fail(trouble);
  }
}

// Why waiting for `peer` is in vain; empty where it may yet come.
std::string Group::trouble_with(int peer, double waited_s) const {
  for (int r = 0; r < size(); ++r) {
    if (r != rank_ && peers_[r].page->gave_up.load(std::memory_order_acquire) != 0) {
      return peers_[r].name + " gave up, so that " + operation_ + " cannot end";
    }
  }
  const std::string who = peers_[peer].name + " (pid " + std::to_string(peers_[peer].pid) + ")";
  if (has_ended(peers_[peer].process)) return who + " ended before it joined " + operation_;
  if (waited_s <= timeout_s_) return "";
  char limit[32];
  std::snprintf(limit, sizeof limit, "%g", timeout_s_);
  return who + " did not join " + operation_ + " within " + limit +
         " s: it hangs or is overloaded; raise the limit with --collective-timeout or TP_COLLECTIVE_TIMEOUT";
}

void Group::await_arrival(int peer, uint64_t number) {
  const auto& arrived = peers_[peer].page->arrived;
  await(peer, [&] { return arrived.load(std::memory_order_acquire) >= number; });
}

// Before writing this operation's slot: every peer has arrived at the one before.
void Group::await_previous() {
  if (all_arrived_ + 1 >= number_) return;
  for (int r = 0; r < size(); ++r) {
    if (r != rank_) await_arrival(r, number_ - 1);
  }
  all_arrived_ = number_ - 1;
}

void Group::one_shot(Element element, Reduction reduction, const uint8_t* x, uint8_t* out, size_t count) {
  const uint64_t number = begin("all_reduce");
  await_previous();
  std::memcpy(slot(rank_, number), x, count * element_bytes(element));
  arrive(number);
  for (int r = 0; r < size(); ++r) {
    sources_[r] = r == rank_ ? x : slot(r, number);
    if (r != rank_) await_arrival(r, number);
  }
  all_arrived_ = number;
  reduce(element, reduction, sources_.data(), size(), count, out);
}

void Group::two_shot(Element element, Reduction reduction, const uint8_t* x, uint8_t* out, size_t count) {
  const uint64_t number = begin("all_reduce");
  await_previous();
  // Parts of whole cache lines, one a rank.
  const size_t bytes = count * element_bytes(element), part = rounded((bytes + size() - 1) / size());
  const auto start = [&](int r) { return std::min(part * r, bytes); };
  uint8_t* mine = slot(rank_, number);
  std::memcpy(mine, x, start(rank_));
  std::memcpy(mine + start(rank_ + 1), x + start(rank_ + 1), bytes - start(rank_ + 1));
  arrive(number);
  for (int r = 0; r < size(); ++r) {
    sources_[r] = (r == rank_ ? x : slot(r, number)) + start(rank_);
    if (r != rank_) await_arrival(r, number);
  }
  all_arrived_ = number;
  const size_t own = start(rank_ + 1) - start(rank_);
  reduce(element, reduction, sources_.data(), size(), own / element_bytes(element), mine + start(rank_));
  peers_[rank_].page->reduced.store(number, std::memory_order_release);
  std::memcpy(out + start(rank_), mine + start(rank_), own);
  for (int i = 1; i < size(); ++i) {
    const int r = (rank_ + i) % size();
    const auto& reduced = peers_[r].page->reduced;
    await(r, [&] { return reduced.load(std::memory_order_acquire) >= number; });
    std::memcpy(out + start(r), slot(r, number) + start(r), start(r + 1) - start(r));
  }
}

void Group::all_reduce(Element element, Reduction reduction, const void* x, void* out, size_t count) {
  const std::lock_guard<std::mutex> guard(mutex_);
  const size_t width = element_bytes(element), piece = slot_bytes_ / width;
  for (size_t at = 0; at < count; at += piece) {
    const size_t n = std::min(piece, count - at);
    const auto* from = static_cast<const uint8_t*>(x) + at * width;
    auto* to = static_cast<uint8_t*>(out) + at * width;
    if (n * width < two_shot_bytes_) {
      one_shot(element, reduction, from, to, n);
    } else {
      two_shot(element, reduction, from, to, n);
    }
  }
}

void Group::all_gather(const void* x, void* out, size_t bytes) {
  const std::lock_guard<std::mutex> guard(mutex_);
  const auto* from = static_cast<const uint8_t*>(x);
  for (size_t at = 0; at < bytes; at += slot_bytes_) {
    const size_t n = std::min(slot_bytes_, bytes - at);
    const uint64_t number = begin("all_gather");
    await_previous();
    std::memcpy(slot(rank_, number), from + at, n);
    arrive(number);
    for (int r = 0; r < size(); ++r) {
      if (r != rank_) await_arrival(r, number);
      std::memcpy(static_cast<uint8_t*>(out) + r * bytes + at, r == rank_ ? from + at : slot(r, number), n);
    }
    all_arrived_ = number;
  }
}

void Group::broadcast(void* x, size_t bytes, int source) {
  const std::lock_guard<std::mutex> guard(mutex_);
  auto* data = static_cast<uint8_t*>(x);
  for (size_t at = 0; at < bytes; at += slot_bytes_) {
    const size_t n = std::min(slot_bytes_, bytes - at);
    const uint64_t number = begin("broadcast");
    if (rank_ == source) {
      await_previous();
      std::memcpy(slot(rank_, number), data + at, n);
      arrive(number);
    } else {
      arrive(number);
      await_arrival(source, number);
      std::memcpy(data + at, slot(source, number), n);
    }
  }
}

}  // namespace tp
