// tests/emulator/fast_maths.cu: FastMaths, as the kernels compute it.
#include "../../csrc/persistent/block.cuh"
#include "persistent_forward_instances.h"

namespace stacked_lstm::persistent {

using cuda::persistent::FastMaths;

Gates<float> fast_gates(bool tanh_unit, const Gates<float>& a) {
  return tanh_unit ? activate_gates<FastMaths<true>>(a) : activate_gates<FastMaths<false>>(a);
}
float fast_tanh(bool tanh_unit, float x) { return tanh_unit ? FastMaths<true>::tanh(x) : FastMaths<false>::tanh(x); }

}  // namespace stacked_lstm::persistent
