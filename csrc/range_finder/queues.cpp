#include "range_finder/queues.h"

#include <condition_variable>
#include <deque>
#include <thread>
#include <utility>

namespace galore_rrf {

class HostQueues::Point {
 public:
  void reach() {
    const std::lock_guard lock(mutex_);
    reached_ = true;
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return reached_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool reached_ = false;
};

// Its own lock, not one of all lanes: a lock shared by two lanes would order work that no wait orders, and
// so hide from ThreadSanitizer that a wait is missing.
class HostQueues::Thread {
 public:
  explicit Thread(const Around& around) : thread_([this, around] { around([this] { run(); }); }) {}
  ~Thread() {
    push({});
    thread_.join();
  }
  void push(std::function<void()> work) {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(work));
    changed_.notify_one();
  }

 private:
  // Until an empty function comes.
  void run() {
    while (const auto work = next()) work();
  }
  std::function<void()> next() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !queue_.empty(); });
    std::function<void()> work = std::move(queue_.front());
    queue_.pop_front();
    return work;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  std::thread thread_;
};

HostQueues::HostQueues(const Around& around) {
  for (auto& thread : threads_) thread = std::make_unique<Thread>(around);
}

HostQueues::~HostQueues() {
  failed_ = true;
  end();
}

void HostQueues::submit(Lane lane, std::function<void()> work) {
  threads_[static_cast<size_t>(lane)]->push([this, work = std::move(work)] { run(work); });
}

HostQueues::Event HostQueues::record(Lane lane) {
  const Event event = std::make_shared<Point>();
  threads_[static_cast<size_t>(lane)]->push([event] { event->reach(); });
  return event;
}

void HostQueues::wait(Wait, Lane lane, Event event) {
  threads_[static_cast<size_t>(lane)]->push([event = std::move(event)] { event->wait(); });
}

void HostQueues::wait(Wait, const Event& event) {
  event->wait();
  if (failed_.load(std::memory_order_relaxed)) finish();
}

void HostQueues::finish() {
  end();
  if (exception_) std::rethrow_exception(std::exchange(exception_, nullptr));
}

void HostQueues::run(const std::function<void()>& work) noexcept {
  // Relaxed: what comes before a failure is read after the threads have ended, and no other order is
  // promised.
  if (failed_.load(std::memory_order_relaxed)) return;
  try {
    work();
  } catch (...) {
    const std::lock_guard lock(mutex_);
    if (!exception_) exception_ = std::current_exception();
    failed_.store(true, std::memory_order_relaxed);
  }
}

void HostQueues::end() {
  for (auto& thread : threads_) thread.reset();
}

}  // namespace galore_rrf
