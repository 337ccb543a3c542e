// The look-ahead schedule of the right-looking Householder range finder (Penke and Herten 2026): who does
// what, after what.  Free of frameworks, as queues.h is.
#pragma once

#include <array>
#include <cstdint>

#include "range_finder/queues.h"

namespace galore_rrf {

// Block i takes a test matrix, its sketch with the trailing matrix, the sketch's factorisation (the panel)
// and the trailing update by its reflectors.  The sketch of block i + 1 is one of the matrix *before* update
// i, and panel i + 1 applies the reflectors of block i to it: so a panel waits for a sketch alone, and runs
// beside the update before it.
//
//   random   fill 0, fill 1 |  fill 2           |  fill 3
//   update         sketch 0 |  sketch 1         |  update 0   sketch 2 |  update 1   sketch 3 | ...
//   panel                   |  factor 0         |  factor 1            |  factor 2            | ...
//
// Test matrices and sketches have two buffers each, used in turn.  The host tests the norm that block i
// leaves while block i + 1 is under way, so at most one block is computed that nobody wants; the first ones
// are as if it had not been.
//
// Work has fill(i), sketch(i), factor(i), update(i), which ends with the norm; and for the host test(i),
// which reads that norm, and wanted(), how many blocks it takes by what has been tested, never more than
// before. Returns how many were computed, all of them tested.
template <class Queues, class Work>
int64_t look_ahead(Queues& queues, Work& work) {
  using Event = typename Queues::Event;
  std::array<Event, 2> sketched, measured;

  const auto submit_sketch = [&](int64_t i) {
    Event& made = sketched[static_cast<size_t>(i % 2)];
    if (i >= 2) queues.wait(Wait::test_matrix_free, Lane::random, made);
    queues.submit(Lane::random, [&work, i] { work.fill(i); });
    queues.wait(Wait::test_matrix_filled, Lane::update, queues.record(Lane::random));
    // That panel i - 2 has read the sketch's buffer, update i - 2 has waited for, earlier in this lane.
    queues.submit(Lane::update, [&work, i] { work.sketch(i); });
    made = queues.record(Lane::update);
  };

  const auto test = [&](int64_t i) {
    queues.wait(Wait::norm_measured, measured[static_cast<size_t>(i % 2)]);
    work.test(i);
  };

  int64_t done = 0;
  if (work.wanted() > 0) submit_sketch(0);
  for (; done < work.wanted(); ++done) {
    const int64_t i = done;
    if (i + 1 < work.wanted()) submit_sketch(i + 1);
    queues.wait(Wait::sketch_made, Lane::panel, sketched[static_cast<size_t>(i % 2)]);
    queues.submit(Lane::panel, [&work, i] { work.factor(i); });
    queues.wait(Wait::panel_factored, Lane::update, queues.record(Lane::panel));
    queues.submit(Lane::update, [&work, i] { work.update(i); });
    measured[static_cast<size_t>(i % 2)] = queues.record(Lane::update);
    if (i > 0) test(i - 1);
  }
  if (done > 0) test(done - 1);
  queues.finish();
  return done;
}

}  // namespace galore_rrf
