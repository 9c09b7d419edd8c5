// Collectives among ranks of one host through memory that all of them map.
//
// Each rank owns one shared file: a page of counters that only it writes, and two slots for data (which of two
// ranks the other fills: the reader's copy lies on its node). An
// operation is numbered; number s uses slot s % 2. A rank may write its slot for s once every peer has
// arrived at s - 1, because a peer that arrived at s - 1 has read everything of s - 2. Reductions wait for
// all peers anyway, so that this costs them nothing.
//
// Waiting never burns a core for long and never lasts for ever: it spins for some microseconds, yields (two
// ranks on one core take turns), sleeps after some milliseconds, and ends with an error at the deadline, when
// a peer has died, or when a peer has given up and said so.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "reduce.h"

namespace tp {

struct Page;  // a rank's counters, in shared memory

// What a rank knows of another (or of itself).
struct Peer {
  Page* page = nullptr;
  uint8_t* slots = nullptr;
  size_t mapped_bytes = 0;
  int process = -1;  // a pidfd; -1 where the host has none
  int64_t pid = 0;
  std::string name;  // "rank 3 of 4", for messages
};

class Group {
 public:
  // paths, pids, names: of all ranks in order; paths[rank] is this rank's own. Throws std::runtime_error where
  // a file cannot be mapped.
  Group(int rank, const std::vector<std::string>& paths, const std::vector<int64_t>& pids,
        const std::vector<std::string>& names, double timeout_s);
  ~Group();
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  // Bytes a file must have for slots of `slot_bytes` each.
  static size_t file_bytes(size_t slot_bytes);

  void set_timeout(double timeout_s) { timeout_s_ = timeout_s; }
  // From this size on the ranks each reduce a part and share it, below it each reduces everything.
  void set_two_shot_bytes(size_t bytes) { two_shot_bytes_ = bytes; }
  int size() const { return static_cast<int>(peers_.size()); }
  // Tells the peers that nothing more will come from here; every later operation fails with `reason`.
  void give_up(const std::string& reason);

  // All throw CollectiveFailure. x and out may be the same.
  void all_reduce(Element element, Reduction reduction, const void* x, void* out, size_t count);
  void all_gather(const void* x, void* out, size_t bytes);  // out: size() times `bytes`
  void broadcast(void* x, size_t bytes, int source);

 private:
  void one_shot(Element element, Reduction reduction, const uint8_t* x, uint8_t* out, size_t count);
  void two_shot(Element element, Reduction reduction, const uint8_t* x, uint8_t* out, size_t count);

  uint64_t begin(const char* operation);  // the number of the next operation
  void await_arrival(int peer, uint64_t number);
  void await_previous();
  void arrive(uint64_t number);
  uint8_t* slot(int peer, uint64_t number) const;
  template <typename Reached>
  void await(int peer, const Reached& reached);
  std::string trouble_with(int peer, double waited_s) const;
  void end(const std::string& reason);
  [[noreturn]] void fail(const std::string& what);

  std::mutex mutex_;
  int rank_;
  std::vector<Peer> peers_;
  std::vector<const void*> sources_;  // one a rank, for reduce()
  size_t slot_bytes_ = 0, two_shot_bytes_;
  double timeout_s_;
  uint64_t number_ = 0, all_arrived_ = 0;
  const char* operation_ = "";
  std::string failure_;
};

// A peer died, hung past the deadline, or gave up.
struct CollectiveFailure {
  std::string what;
};

}  // namespace tp
