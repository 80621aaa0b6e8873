// csrc/torch/eager.h: an ordinary, eager call of the module: the operator `forward`, and a node of the autograd graph whose
// backward is the operator `backward`.
//
// torch calls an operator's registered autograd formula in Python and passes it each tensor of a list separately. For a
// small stack that takes longer than the kernels. This is the same formula in C++, for the plain case (plain.h). Python
// does all other cases, and a backward pass that is itself to be differentiated or mapped: see Formula.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "../driver/call.h"

namespace stacked_lstm {

struct EagerCall {
  const at::Tensor& input;  // (T, B, I), or, with batch_sizes, (rows, I)
  OptionalTensor batch_sizes;
  OptionalTensor h_0, c_0;  // both or neither: then zeros
  at::TensorList weights;
  OptionalTensor seed;
  const StackOptions& options;
  const std::string& backend;
  bool frozen;  // kept packed weights are used without comparing them; a backward pass ignores this
  OptionalTensor lengths, resets;
};

struct EagerResults {
  at::Tensor output, h_n, c_n;
};

// Returns nothing if a call is not the plain case, or if its arguments do not fit each other: the caller then reports
// the error. Under autocast, the caller has already cast the tensors.
std::optional<EagerResults> call_eagerly(const EagerCall& call);

// What a backward pass needs, as the forward pass left it.
struct EagerSaved {
  at::Tensor input;
  OptionalTensor batch_sizes;
  at::Tensor h_0, c_0;
  std::vector<at::Tensor> weights;
  OptionalTensor seed;
  at::Tensor output, reserve;
  const StackOptions& options;
  const std::string& backend;
  OptionalTensor lengths, resets;
};

// The formula in Python, for a backward pass that no kernel can do: (gradients that flow in, what was saved, whether input,
// h_0, c_0 and each weight need one) -> gradients in that order, undefined where there is none.
using Formula = std::function<std::vector<at::Tensor>(const std::array<at::Tensor, 3>& flowing, const EagerSaved& saved,
                                                      const std::vector<bool>& needs)>;
void set_formula(Formula formula);

}  // namespace stacked_lstm
