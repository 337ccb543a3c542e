#include <catch2/catch.hpp>

#include "cuda/capability.h"

using galore_rrf::capability_error;

TEST_CASE("a device below compute capability 8.0 is refused by name") {
  CHECK(
      capability_error(7, 5) ==
      "galore_rrf needs a GPU of compute capability 8.0 or higher (A100, RTX 30 and later), this one has 7.5");
  CHECK_THAT(capability_error(6, 1), Catch::EndsWith("6.1"));
  for (const auto& [major, minor] : {std::pair{8, 0}, {8, 6}, {9, 0}, {12, 1}}) {
    CHECK(capability_error(major, minor).empty());
  }
}
