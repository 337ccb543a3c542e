#include "range_finder/stream_queues.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <map>
#include <mutex>

namespace galore_rrf {
namespace {

c10::Stream current_stream(c10::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

// The same three streams for every call on a device: ATen keeps a workspace of cuBLAS for every stream that
// was ever used, and the memory pools are by stream too.  Panels, small kernels that all else comes to wait
// for, have priority.
std::array<c10::Stream, kLanes> lanes_of(c10::Device device) {
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, std::array<c10::Stream, kLanes>> known;
  const std::lock_guard lock(mutex);
  const auto found = known.find(device.index());
  if (found != known.end()) return found->second;
  const c10::impl::VirtualGuardImpl guard(device.type());
  const auto lane = [&](bool priority) { return guard.getStreamFromGlobalPool(device, priority); };
  return known.try_emplace(device.index(), std::array{lane(false), lane(true), lane(false)}).first->second;
}

}  // namespace

StreamQueues::StreamQueues(c10::Device device) : caller_(current_stream(device)), lanes_(lanes_of(device)) {
  const Event begun = recorded(caller_);
  for (const c10::Stream& lane : lanes_) begun->block(lane);
}

StreamQueues::~StreamQueues() {
  if (finished_) return;
  try {
    finish();
  } catch (const std::exception& error) {
    TORCH_WARN("the streams of a range finder could not be joined: ", error.what());
  }
}

void StreamQueues::finish() {
  for (const c10::Stream& lane : lanes_) recorded(lane)->block(caller_);
  finished_ = true;
}

StreamQueues::Event StreamQueues::recorded(const c10::Stream& stream) {
  const auto event = std::make_shared<c10::Event>(stream.device_type());
  event->record(stream);
  return event;
}

void used_in_current_stream(const at::Tensor& a) {
  if (!a.is_cpu()) a.record_stream(current_stream(a.device()));
}

}  // namespace galore_rrf
