// Three queues of work beside one another: on host threads here, on streams in stream_queues.h.  Free of
// frameworks, so that ThreadSanitizer sees all of it (tests/queues).
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>

namespace galore_rrf {

// What look-ahead does beside one another: test matrices | panels | trailing updates and the next sketches.
enum class Lane { random, panel, update };
constexpr size_t kLanes = 3;

// Every wait of look-ahead (look_ahead.h), by what it waits for.
enum class Wait {
  test_matrix_free,    // the sketch that read this buffer before
  test_matrix_filled,  // the test matrix of a sketch
  sketch_made,         // the sketch of a panel
  panel_factored,      // the reflectors of a trailing update
  norm_measured,       // the norm that the host tests
};

// A thread a lane, first in, first out.
//
// Once a piece of work has thrown, those that wait in any lane are left out, and the exception reaches the
// caller from the next wait of the host's or from finish(), when all threads have ended.
class HostQueues {
 public:
  // All that a lane was given so far.
  class Point;
  using Event = std::shared_ptr<Point>;

  // Each thread runs inside a call of `around`, which gives it what the caller's thread has.
  using Around = std::function<void(const std::function<void()>&)>;
  explicit HostQueues(const Around& around);
  // Leaves out what has not begun.
  ~HostQueues();

  void submit(Lane lane, std::function<void()> work);
  Event record(Lane lane);
  // What the lane is given from here on comes after the event.
  void wait(Wait, Lane lane, Event event);
  // The caller waits.
  void wait(Wait, const Event& event);
  // All work is done, and no thread is left.
  void finish();

 private:
  class Thread;

  void run(const std::function<void()>& work) noexcept;
  void end();

  std::atomic<bool> failed_ = false;
  std::mutex mutex_;  // of the exception alone
  std::exception_ptr exception_;
  std::array<std::unique_ptr<Thread>, kLanes> threads_;
};

}  // namespace galore_rrf
