// csrc/torch/states.cpp: see states.h.
#include "states.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "../cpu/reserve.h"
#include "../driver/driver.h"
#include "../stack/link.h"
#include "lengths.h"
#include "prepare.h"

namespace stacked_lstm {

using at::Tensor;

namespace {

std::vector<int64_t> sizes_of(const Call& call, int64_t width) {
  const StackShape& shape = call.shape;
  return call.packed ? std::vector<int64_t>{shape.rows(), width}
                     : std::vector<int64_t>{shape.all_steps(), shape.batch, width};
}

}  // namespace

States states_of(const Call& call, const Results& results, bool on_cpu) {
  const StackShape& shape = call.shape;
  const int64_t rows = shape.all_rows(), directions = shape.directions;
  const auto type = call.input.scalar_type();
  const bool wide = arithmetic_type(call.input) == type;
  const KeptRows kept =
      on_cpu ? kept_rows(shape, {call.saving, !wide, true}) : driver::kept_rows(shape, call.saving, true);
  const ReserveLayout layout(shape, kept);
  const Tensor& reserve = results.reserve;
  // On a GPU, h is kept in the tensors' dtype; the CPU kernels keep what they have computed.
  const auto h_type = on_cpu ? reserve.scalar_type() : type;
  // With lengths, a reserve on the CPU has the rows that exist, one behind the other; on a GPU, and in the results, every step
  // has all rows.
  const bool compact = on_cpu && shape.has_lengths();
  const Tensor existing = compact ? existing_rows(shape) : Tensor();
  const auto store = [&](const Tensor& result, const Tensor& source) {
    if (!compact) return result.copy_(source), void();
    result.zero_().index_copy_(0, existing, source.narrow(0, 0, existing.numel()).to(result.scalar_type()));
  };
  States states;
  for (int64_t k = 0; k < shape.depth(); ++k) {
    const LayerShape& layer = shape.layers[static_cast<size_t>(k)];
    const int64_t width = directions * layer.output();
    Tensor h = at::empty(sizes_of(call, width), call.input.options());
    Tensor c = at::empty(sizes_of(call, directions * layer.hidden), call.input.options());
    if (rows > 0) {
      if (keeps_h(shape, kept, k)) {
        const Tensor all =
            reserve.narrow(0, layout.size().cells(), reserve.numel() - layout.size().cells()).view(h_type);
        store(h.view({rows, width}), all.narrow(0, layout.h(k), rows * width).view({rows, width}));
      } else {
        h.copy_(results.output.narrow(-1, output_column(shape, k), width));
      }
      for (int64_t d = 0; d < directions; ++d) {
        const int64_t padded = layer.padded_hidden();
        const Tensor lane = reserve.narrow(0, layout.c(k * directions + d), rows * padded).view({rows, padded});
        store(c.view({rows, directions * layer.hidden}).narrow(1, d * layer.hidden, layer.hidden),
              lane.narrow(1, 0, layer.hidden));
      }
      if (!compact) clear_padding(h, shape), clear_padding(c, shape);
    }
    states.h.push_back(h), states.c.push_back(c);
  }
  return states;
}

void take_state_gradients(const Call& call, IncomingGradients& incoming) {
  const StackShape& shape = call.shape;
  const auto check = [&](const std::vector<OptionalTensor>& gradients, const char* name, bool cell) {
    TORCH_CHECK_VALUE(static_cast<int64_t>(gradients.size()) == shape.depth(), name, " should have ", shape.depth(),
                      " entries, got: ", gradients.size());
    for (int64_t k = 0; k < shape.depth(); ++k) {
      const OptionalTensor& gradient = gradients[static_cast<size_t>(k)];
      if (!gradient) continue;
      const LayerShape& layer = shape.layers[static_cast<size_t>(k)];
      check_same(*gradient, call.input, name);
      check_shape(*gradient, sizes_of(call, shape.directions * (cell ? layer.hidden : layer.output())), name, "", k);
    }
  };
  check(incoming.h, "grad_hidden", false);
  check(incoming.c, "grad_cell", true);
  if (shape.link == LinkKind::residual && shape.depth() > 1) return;  // the output is not h of the top layer
  if (shape.link == LinkKind::skip && shape.depth() > 1) {            // it is h of every layer
    const auto given = [](const OptionalTensor& h) { return h.has_value(); };
    if (std::none_of(incoming.h.begin(), incoming.h.end(), given)) return;
    Tensor all = incoming.output ? incoming.output->clone() : at::zeros(call.output_sizes(), call.input.options());
    for (int64_t k = 0; k < shape.depth(); ++k) {
      OptionalTensor& h = incoming.h[static_cast<size_t>(k)];
      if (h) all.narrow(-1, output_column(shape, k), columns_from_below(shape, k + 1)).add_(*h);
      h.reset();
    }
    incoming.output = all;
    return;
  }
  OptionalTensor& top = incoming.h.back();
  if (top) incoming.output = incoming.output ? incoming.output->add(*top) : *top;
  top.reset();
}

}  // namespace stacked_lstm
