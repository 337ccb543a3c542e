// The look-ahead schedule on streams of a device that does nothing but keep account of order: a clock a
// stream, read and moved by events as CUDA's are.  Every access to what lanes share must come after those
// that it conflicts with, however long each stream takes.
//
//     streams             as it is
//     streams WAIT        without one of its waits, which must show
//     streams throws LANE with an exception in a lane
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "range_finder/look_ahead.h"
#include "range_finder/stream_queues.h"

namespace {

using galore_rrf::Lane;
using galore_rrf::StreamQueues;
using galore_rrf::Wait;

constexpr const char* kWaits[] = {"test_matrix_free", "test_matrix_filled", "sketch_made", "panel_factored",
                                  "norm_measured"};
constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;
constexpr size_t kStreams = 16, kHost = kStreams;

// How much of every stream and of the host is known to have happened.
using Clock = std::array<int64_t, kStreams + 1>;

struct Account {
  std::array<Clock, kStreams + 1> clocks{};
  std::map<void*, Clock> events;
  c10::StreamId current = 3, next = 5;
  struct Access {
    size_t where;
    int64_t when;
    bool writes;
  };
  std::map<std::string, std::vector<Access>> accesses;
  std::set<std::string> races;

  void join(size_t into, const Clock& from) {
    for (size_t i = 0; i < from.size(); ++i) clocks[into][i] = std::max(clocks[into][i], from[i]);
  }
  void access(const std::string& name, bool writes, bool by_host = false) {
    const size_t where = by_host ? kHost : static_cast<size_t>(current);
    join(where, clocks[kHost]);  // nothing runs before it is launched
    for (const Access& earlier : accesses[name]) {
      if ((writes || earlier.writes) && clocks[where][earlier.where] < earlier.when) races.insert(name);
    }
    accesses[name].push_back({where, ++clocks[where][where], writes});
  }
  void read(const std::string& name) { access(name, false); }
  void write(const std::string& name) { access(name, true); }
} account;

class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device device) const override { return device; }
  c10::Device getDevice() const override { return {kType, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device device) const override { return stream(device, account.current); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return stream(device, account.next++);
  }
  c10::Stream exchangeStream(c10::Stream to) const override {
    return stream(to.device(), std::exchange(account.current, to.id()));
  }
  void record(void** event, const c10::Stream& from, c10::DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = new char;
    account.join(static_cast<size_t>(from.id()), account.clocks[kHost]);
    account.events[*event] = account.clocks[static_cast<size_t>(from.id())];
  }
  void block(void* event, const c10::Stream& to) const override {
    account.join(static_cast<size_t>(to.id()), account.events.at(event));
  }
  void synchronizeEvent(void* event) const override { account.join(kHost, account.events.at(event)); }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    account.events.erase(event);
    delete static_cast<char*>(event);
  }
  bool queryEvent(void*) const override { return false; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

 private:
  static c10::Stream stream(c10::Device device, c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kType, std::max<c10::DeviceIndex>(0, device.index())),
                       id);
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

class Queues {
 public:
  using Event = StreamQueues::Event;

  explicit Queues(const std::string& missing) : missing_(missing) {}
  template <class F>
  void submit(Lane lane, const F& work) {
    queues_.submit(lane, work);
  }
  Event record(Lane lane) { return queues_.record(lane); }
  void wait(Wait name, Lane lane, const Event& event) {
    if (there(name)) queues_.wait(name, lane, event);
  }
  void wait(Wait name, const Event& event) {
    if (there(name)) queues_.wait(name, event);
  }
  void finish() { queues_.finish(); }

 private:
  bool there(Wait name) const { return missing_ != kWaits[static_cast<int>(name)]; }

  std::string missing_;
  StreamQueues queues_{c10::Device(kType, 0)};
};

// What every piece of work reads and writes.
struct Work {
  int64_t blocks;
  std::string throwing;

  static std::string of(const char* name, int64_t i) { return name + std::to_string(i); }
  void may_throw(const char* lane, int64_t i) const {
    if (i == 1 && throwing == lane) throw std::runtime_error("from " + throwing);
  }
  void fill(int64_t i) {
    account.write(of("test matrix ", i % 2));
    may_throw("random", i);
  }
  void sketch(int64_t i) {
    account.read(of("test matrix ", i % 2));
    account.read("matrix");
    account.write(of("sketch ", i % 2));
  }
  void factor(int64_t i) {
    account.write(of("sketch ", i % 2));
    if (i > 0) account.read(of("reflectors ", i - 1));
    account.write(of("reflectors ", i));
    may_throw("panel", i);
  }
  void update(int64_t i) {
    account.read(of("reflectors ", i));
    account.write("matrix");
    account.write(of("norm ", i));
    may_throw("update", i);
  }
  void test(int64_t i) { account.access(of("norm ", i), /*writes=*/false, /*by_host=*/true); }
  int64_t wanted() const { return blocks; }
};

}  // namespace

int main(int argc, char** argv) {
  const std::string missing = argc == 2 ? argv[1] : "", throwing = argc == 3 ? argv[2] : "";
  const std::vector<const char*> given = {"matrix",   "test matrix 0", "test matrix 1", "sketch 0",
                                          "sketch 1", "norm 0",        "norm 1"};
  for (const char* name : given) account.write(name);  // on the caller's stream
  std::string thrown;
  for (const int64_t blocks : {6, 1, 0}) {
    Work work{blocks, throwing};
    Queues queues(missing);
    try {
      galore_rrf::look_ahead(queues, work);
    } catch (const std::runtime_error& error) {
      thrown = error.what();
    }
  }
  if (account.current != 3) std::printf("the caller's stream is no longer the current one\n");
  for (const char* name : given) account.write(name);
  for (int64_t i = 0; i < 6; ++i) account.read(Work::of("reflectors ", i));
  for (const std::string& race : account.races) std::printf("race: %s\n", race.c_str());
  if (!account.events.empty()) std::printf("%d events left\n", static_cast<int>(account.events.size()));
  if (account.next != 5 + 3) std::printf("more than three streams were taken\n");
  if (!thrown.empty()) std::printf("exception %s\n", thrown.c_str());
  return 0;
}
