// What the mock driver does for mocks of libraries that work on its streams.
#pragma once
#include <functional>

namespace mock {

using Work = std::function<int()>;

// Runs `work` on a stream of the current context, or records it.
int enqueue(void* stream, Work work);

// Work that runs now takes so long by the device's clock.
void pass(double microseconds);

}  // namespace mock
