#pragma once

namespace smt_ext::testing {

// Reads or writes one element on the device.
void touch(float* at, bool write);

}  // namespace smt_ext::testing
