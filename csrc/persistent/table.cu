// csrc/persistent/table.cu: the table of the persistent kernels on a GPU. The kernels themselves are instantiated in
// persistent/forward_*.cu and persistent/backward_*.cu, one direction and element type a file, so that a build compiles
// them side by side.
#include "dispatch.cuh"

namespace stacked_lstm::persistent {

namespace {

template <typename T>
PersistentKernels<T> kernels() {
  using Forward = cuda::persistent::ForwardEntry<T>;
  using Backward = cuda::persistent::BackwardEntry<T>;
  return {kForwardInstances<T>.data(),
          static_cast<int>(kForwardInstances<T>.size()),
          kBackwardInstances<T>.data(),
          static_cast<int>(kBackwardInstances<T>.size()),
          Forward::launch,
          Backward::launch,
          Forward::capacity,
          Backward::capacity};
}

}  // namespace

const PersistentTable& cuda_persistent_kernels() {
  static const PersistentTable table = {kernels<float>(), kernels<bfloat16>(), kernels<float16>()};
  return table;
}

}  // namespace stacked_lstm::persistent
