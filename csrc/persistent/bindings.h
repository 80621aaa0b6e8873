// csrc/persistent/bindings.h: the planner of the persistent kernels in the Python module: plans, choices and devices as
// dictionaries. Only torch/bindings.cpp includes it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../cuda/device.h"
#include "../stack/obstacle.h"
#include "../stack/stack.h"
#include "choice.h"
#include "cost.h"
#include "instances.h"
#include "plan.h"
#include "planner.h"
#include "timeline.h"

namespace stacked_lstm::persistent {

namespace py = pybind11;

inline py::dict describe(const Device& device) {
  return py::dict(py::arg("name") = device.name, py::arg("full_name") = device.full_name,
                  py::arg("capability") = py::make_tuple(device.major, device.minor), py::arg("sms") = device.sms,
                  py::arg("registers_sm") = device.registers_sm, py::arg("shared_block") = device.shared_block,
                  py::arg("shared_sm") = device.shared_sm, py::arg("l2_bytes") = device.l2_bytes,
                  py::arg("max_cluster") = device.max_cluster, py::arg("gpcs") = device.gpcs,
                  py::arg("sms_gpc") = device.sms_gpc, py::arg("short_gpcs") = device.short_gpcs,
                  py::arg("sms_short_gpc") = device.sms_short_gpc, py::arg("clock_mhz") = device.clock_mhz,
                  py::arg("memory_gb_s") = device.memory_gb_s, py::arg("mma_rate") = device.mma_rate,
                  py::arg("mma_share") = device.mma_share, py::arg("fma_rate") = device.fma_rate);
}

// The device for a name of kDevices, or for a dictionary. In a dictionary `like` is such a name, and the other entries,
// named as in describe(), replace figures of that GPU. (What describe() returns needs no `like`.) If the dictionary has
// `gpcs` or `sms_gpc`, all GPCs are alike unless it also has `short_gpcs`.
inline Device device_of(const py::object& told) {
  const auto named = [](const std::string& name) {
    if (const Device* found = device_named(name)) return *found;
    std::string names;
    for (const Device& known : kDevices) names += (names.empty() ? "" : ", ") + known.name;
    throw py::value_error("device should be one of " + names + ", got: " + name);
  };
  if (py::isinstance<py::str>(told)) return named(told.cast<std::string>());
  const auto fields = told.cast<py::dict>();
  Device device = fields.contains("like") ? named(fields["like"].cast<std::string>()) : Device{};
  const auto take = [&](const char* name, auto& to) {
    if (fields.contains(name)) to = fields[name].cast<std::decay_t<decltype(to)>>();
  };
  std::pair capability{device.major, device.minor};
  take("name", device.name), take("full_name", device.full_name), take("capability", capability);
  device.major = capability.first, device.minor = capability.second;
  take("sms", device.sms), take("registers_sm", device.registers_sm), take("shared_block", device.shared_block);
  take("shared_sm", device.shared_sm), take("l2_bytes", device.l2_bytes), take("max_cluster", device.max_cluster);
  if (fields.contains("gpcs") || fields.contains("sms_gpc")) device.short_gpcs = 0;
  take("gpcs", device.gpcs), take("sms_gpc", device.sms_gpc), take("clock_mhz", device.clock_mhz);
  take("short_gpcs", device.short_gpcs), take("sms_short_gpc", device.sms_short_gpc);
  take("memory_gb_s", device.memory_gb_s), take("mma_rate", device.mma_rate);
  take("mma_share", device.mma_share), take("fma_rate", device.fma_rate);
  return device;
}

inline DeviceProperties properties_of(const py::dict& told) {
  const auto whole = [&](const char* name) { return told.contains(name) ? told[name].cast<int64_t>() : 0; };
  const auto small = [&](const char* name) { return static_cast<int>(whole(name)); };
  DeviceProperties properties;
  if (told.contains("name")) properties.name = told["name"].cast<std::string>();
  properties.major = small("major"), properties.minor = small("minor"), properties.sms = small("sms");
  properties.registers_sm = small("registers_sm"), properties.shared_block = small("shared_block");
  properties.shared_sm = small("shared_sm"), properties.l2_bytes = whole("l2_bytes");
  properties.max_cluster = small("max_cluster"), properties.clock_khz = small("clock_khz");
  properties.memory_clock_khz = small("memory_clock_khz"), properties.memory_bus_bits = small("memory_bus_bits");
  return properties;
}

// The built-in costs; those that `told` names are replaced.
inline Costs costs_of(const py::dict& told) {
  Costs costs;
  for (const auto& [key, value] : told) {
    const auto name = key.cast<std::string>();
    const auto* found = std::find_if(std::begin(Costs::kAll), std::end(Costs::kAll),
                                     [&](const Costs::Named& known) { return name == known.name; });
    if (found == std::end(Costs::kAll)) throw py::value_error("there is no cost of the name " + name);
    const auto number = value.cast<double>();
    if (!(number > 0 && number < 1e9)) {
      throw py::value_error(name + " should be a number above 0, got: " + std::to_string(number));
    }
    costs.*found->field = number;
  }
  return costs;
}

inline py::dict describe(const Costs& costs) {
  py::dict all;
  for (const Costs::Named& cost : Costs::kAll) all[cost.name] = costs.*cost.field;
  return all;
}

inline py::dict describe(const Terms& terms) {
  py::dict all;
  for (const Terms::Named& term : Terms::kAll) all[term.name] = terms.*term.field;
  return all;
}

inline py::dict describe(const Cut& cut) {
  return py::dict(py::arg("product") = name_of(cut.product), py::arg("exchange") = name_of(cut.exchange),
                  py::arg("tiles") = cut.batch_tiles, py::arg("pieces") = cut.pieces, py::arg("splits") = cut.splits,
                  py::arg("m_tiles") = cut.unit_tiles, py::arg("groups") = cut.groups, py::arg("blocks") = cut.blocks,
                  py::arg("chunk_steps") = cut.chunk_steps, py::arg("inputs_in_shared") = cut.inputs_in_shared);
}

inline py::dict describe(const Pass& pass, const StackShape& shape) {
  py::list layers, units, sequences;
  for (const LayerPlan& layer : pass.layers) {
    layers.append(py::dict(py::arg("layer") = layer.layer, py::arg("hidden") = pass.hidden,
                           py::arg("inputs") = shape.layers[static_cast<size_t>(layer.layer)].input,
                           py::arg("first_block") = layer.first_block,
                           py::arg("registers_bytes") = layer.registers_bytes, py::arg("w_ih") = name_of(layer.w_ih),
                           py::arg("w_ih_bytes") = layer.w_ih_bytes, py::arg("step_us") = layer.step_us));
  }
  for (int64_t b = 0; b < pass.cut.blocks; ++b) {
    units.append(py::make_tuple(pass.first_unit(b), pass.first_unit(b + 1)));
  }
  for (int64_t g = 0; g < pass.batch_groups; ++g) {
    sequences.append(py::make_tuple(pass.first_sequence(shape.batch, g), pass.first_sequence(shape.batch, g + 1)));
  }
  return py::dict(
      py::arg("first_layer") = pass.first_layer, py::arg("last_layer") = pass.last_layer, py::arg("over") = pass.over,
      py::arg("cut") = describe(pass.cut), py::arg("units") = units, py::arg("sequences") = sequences,
      py::arg("batch_groups") = pass.batch_groups, py::arg("copies") = pass.copies, py::arg("rounds") = pass.rounds,
      py::arg("segment_steps") = pass.segment_steps, py::arg("segments") = pass.segments(shape.steps),
      py::arg("products_beside") = pass.products_beside, py::arg("threads") = pass.threads,
      py::arg("registers_thread") = pass.registers_thread, py::arg("weight_registers") = pass.weight_registers,
      py::arg("shared_bytes") = pass.shared_bytes, py::arg("l2_bytes") = pass.l2_bytes,
      py::arg("blocks") = pass.blocks(), py::arg("lanes") = pass.lanes(), py::arg("makespan_us") = pass.makespan_us,
      py::arg("step_us") = pass.step_us, py::arg("ahead_us") = pass.ahead_us, py::arg("terms") = describe(pass.terms),
      py::arg("layers") = layers);
}

// The timeline's entries are (pass, batch_group, layer, direction, chunk, first_block, blocks, needs_layer,
// needs_chunks, start_us, end_us).
inline py::dict describe(const Plan& plan, const StackShape& shape, const Costs& costs, bool with_timeline) {
  py::list passes, work;
  for (const Pass& pass : plan.passes) passes.append(describe(pass, shape));
  if (with_timeline) {
    for (const Work& w : timeline(plan, shape, costs)) {
      work.append(py::make_tuple(w.pass, w.batch_group, w.layer, w.direction, w.chunk, w.first_block, w.blocks,
                                 w.needs_layer, w.needs_chunks, w.start_us, w.end_us));
    }
  }
  return py::dict(py::arg("why_not") = plan.why_not, py::arg("backward") = plan.backward, py::arg("passes") = passes,
                  py::arg("terms") = describe(plan.terms), py::arg("after_us") = plan.after_us,
                  py::arg("predicted_us") = plan.predicted_us, py::arg("step_us") = plan.step_us,
                  py::arg("limit_us") = plan.limit_us, py::arg("binds") = plan.binds, py::arg("timeline") = work);
}

inline py::dict describe(const DiagonalCost& cost) {
  return py::dict(py::arg("predicted_us") = cost.total_us, py::arg("host_us") = cost.host_us,
                  py::arg("device_us") = cost.device_us, py::arg("large_us") = cost.large_us,
                  py::arg("diagonals") = cost.diagonals, py::arg("binds") = cost.binds());
}

inline py::dict describe(const Choice& choice, const StackShape& shape, const Costs& costs, bool with_timeline) {
  return py::dict(py::arg("persistent") = choice.persistent, py::arg("reason") = choice.reason,
                  py::arg("forward") = describe(choice.forward, shape, costs, with_timeline),
                  py::arg("backward") = describe(choice.backward, shape, costs, with_timeline),
                  py::arg("diagonal_forward") = describe(choice.diagonal_forward),
                  py::arg("diagonal_backward") = describe(choice.diagonal_backward),
                  py::arg("persistent_us") = choice.persistent_us, py::arg("diagonal_us") = choice.diagonal_us);
}

template <typename T>
void take_instances(Ask& ask) {
  ask.forward = kForwardInstances<T>.data(), ask.forward_count = static_cast<int64_t>(kForwardInstances<T>.size());
  ask.backward = kBackwardInstances<T>.data(), ask.backward_count = static_cast<int64_t>(kBackwardInstances<T>.size());
}

// What the planner is asked, for the instances that are compiled. `capacity`: None, or a function that answers instead
// of CUDA's driver: capacity(backward, cut, most_inputs, hidden, over) -> blocks.
inline Ask ask_of(int64_t element_bytes, const std::string& product, const std::string& saving, bool states,
                  const py::object& capacity) {
  Ask ask;
  ask.bytes = element_bytes;
  ask.states = states;
  if (product != "tensor" && product != "exact") {
    throw py::value_error("product should be one of tensor, exact, got: " + product);
  }
  ask.product = product == "exact" ? Product::exact : Product::tensor;
  if (saving != "none" && saving != "full" && saving != "recompute") {
    throw py::value_error("saving should be one of none, full, recompute, got: " + saving);
  }
  ask.saving = saving == "none" ? Saving::none : saving == "full" ? Saving::full : Saving::recompute;
  if (element_bytes == 2) take_instances<bfloat16>(ask);
  if (element_bytes == 4) take_instances<float>(ask);
  if (!capacity.is_none()) {
    ask.capacity = [capacity](bool backward, const Cut& cut, int most_inputs, int hidden, bool over) {
      return capacity(backward, describe(cut), most_inputs, hidden, over).cast<int64_t>();
    };
  }
  return ask;
}

inline ElementType element_type_of(int64_t bytes) {
  return bytes == 8 ? ElementType::float64 : bytes == 4 ? ElementType::float32 : ElementType::bfloat16;
}

inline StackOptions options_of(int64_t input_size, const std::vector<int64_t>& hidden_sizes, int64_t proj_size,
                               bool bidirectional) {
  if (input_size < 1) throw py::value_error("input_size should be at least 1, got: " + std::to_string(input_size));
  for (const int64_t hidden : hidden_sizes) {
    if (hidden < 1) throw py::value_error("hidden sizes should be at least 1, got: " + std::to_string(hidden));
  }
  StackOptions options;
  options.input_size = input_size, options.num_layers = static_cast<int64_t>(hidden_sizes.size());
  options.hidden_size = PerLayer<int64_t>(hidden_sizes);
  options.proj_size = proj_size, options.bidirectional = bidirectional;
  return options;
}

inline void bind_persistent_plan(py::module_& m) {
  using namespace py::literals;
  m.def("persistent_devices", [] {
    py::list devices;
    for (const Device& device : kDevices) devices.append(describe(device));
    return devices;
  });
  m.def("persistent_device_from", [](const py::dict& told) { return describe(device_from(properties_of(told))); });
  m.def("persistent_costs", [] { return describe(Costs{}); });
  m.def("persistent_instances", [](int64_t element_bytes, bool backward) {
    const Ask ask = ask_of(element_bytes, "tensor", "none", false, py::none());
    const Instance* first = backward ? ask.backward : ask.forward;
    py::list instances;
    for (const Instance* i = first; i < first + (backward ? ask.backward_count : ask.forward_count); ++i) {
      instances.append(py::dict("product"_a = name_of(i->product), "exchange"_a = name_of(i->exchange),
                                "tiles"_a = i->batch_tiles, "pieces"_a = i->pieces, "m_tiles"_a = i->unit_tiles,
                                "weight_registers"_a = weight_registers(*i),
                                "registers_thread"_a = registers_thread(*i)));
    }
    return instances;
  });
  m.def(
      "persistent_plan",
      [](const py::object& device, int64_t input_size, const std::vector<int64_t>& hidden_sizes, int64_t proj_size,
         bool bidirectional, int64_t seq_len, int64_t batch_size, int64_t element_bytes, const std::string& product,
         const std::string& saving, bool backward, bool with_timeline, const py::dict& costs,
         const py::object& capacity, bool states) {
        const StackOptions options = options_of(input_size, hidden_sizes, proj_size, bidirectional);
        StackShape shape;
        shape.steps = seq_len, shape.batch = batch_size;
        set_layers(options, shape);
        const Costs figures = costs_of(costs);
        Ask ask = ask_of(element_bytes, product, saving, states, capacity);
        ask.obstacle = obstacle(Path::persistent, options, element_type_of(element_bytes));
        return describe(plan(shape, device_of(device), figures, ask, backward), shape, figures, with_timeline);
      },
      "device"_a, "input_size"_a, "hidden_sizes"_a, "proj_size"_a, "bidirectional"_a, "seq_len"_a, "batch_size"_a,
      "element_bytes"_a, "product"_a = "tensor", "saving"_a = "none", "backward"_a = false, "timeline"_a = false,
      "costs"_a = py::dict(), "capacity"_a = py::none(), "states"_a = false);
  m.def(
      "persistent_choice",
      [](const py::object& device, int64_t input_size, const std::vector<int64_t>& hidden_sizes, int64_t proj_size,
         bool bidirectional, int64_t seq_len, int64_t batch_size, int64_t element_bytes, const std::string& product,
         const std::string& saving, bool with_timeline, const py::dict& costs, const py::object& capacity,
         bool states) {
        const StackOptions options = options_of(input_size, hidden_sizes, proj_size, bidirectional);
        StackShape shape;
        shape.steps = seq_len, shape.batch = batch_size;
        set_layers(options, shape);
        const Costs figures = costs_of(costs);
        Ask ask = ask_of(element_bytes, product, saving, states, capacity);
        ask.obstacle = obstacle(Path::persistent, options, element_type_of(element_bytes));
        return describe(choose(shape, device_of(device), figures, ask), shape, figures, with_timeline);
      },
      "device"_a, "input_size"_a, "hidden_sizes"_a, "proj_size"_a, "bidirectional"_a, "seq_len"_a, "batch_size"_a,
      "element_bytes"_a, "product"_a = "tensor", "saving"_a = "none", "timeline"_a = false, "costs"_a = py::dict(),
      "capacity"_a = py::none(), "states"_a = false);
}

}  // namespace stacked_lstm::persistent
