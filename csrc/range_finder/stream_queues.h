// The queues of queues.h on streams of a device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/StreamGuard.h>

#include <array>
#include <memory>
#include <utility>

#include "range_finder/queues.h"

namespace galore_rrf {

// A stream a lane.  Work is called at once, with the lane's stream as the current one, and what it launches
// is waited for by events; an exception reaches the caller as any other.  The lanes begin after what the
// caller's stream was given before, and however the queues end, that stream goes on after them.
class StreamQueues {
 public:
  using Event = std::shared_ptr<c10::Event>;

  explicit StreamQueues(c10::Device device);
  ~StreamQueues();
  StreamQueues(const StreamQueues&) = delete;
  StreamQueues& operator=(const StreamQueues&) = delete;

  template <class F>
  void submit(Lane lane, const F& work) {
    const c10::StreamGuard guard(stream(lane));
    work();
  }
  Event record(Lane lane) const { return recorded(stream(lane)); }
  void wait(Wait, Lane lane, const Event& event) const { event->block(stream(lane)); }
  void wait(Wait, const Event& event) const { event->synchronize(); }
  void finish();

 private:
  static Event recorded(const c10::Stream& stream);
  const c10::Stream& stream(Lane lane) const { return lanes_[static_cast<size_t>(lane)]; }

  c10::Stream caller_;
  std::array<c10::Stream, kLanes> lanes_;
  bool finished_ = false;
};

// To be called where a stream uses a tensor that was made in another: its memory is not given away before the
// stream has come to here.
void used_in_current_stream(const at::Tensor& a);

}  // namespace galore_rrf
