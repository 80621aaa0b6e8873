// tests/ptx/launcher.cpp: linked into a program of tests/emulator, it runs what the program launches on the compiled PTX.
//
// The program stays as it is: it prepares memory, launches by csrc/cuda/launch.cuh and judges what was written. Launches that
// the emulator would refuse are refused here, too. The environment says how the others run:
//
//   PTX_FILES   the files that have the kernels, separated by ':'
//   PTX_MODE    alone      the PTX, in place of the emulator (the default)
//               compared   the emulator, and on the same memory the PTX: how far apart they are goes into the log
//               same       likewise, and they have to leave the same bits; a NaN is as good as any other
//   PTX_SUMS    truncated (the default) or nearest: see MmaSums
//   PTX_ORDER   a number: of launches of at most so many threads, the order of accesses is looked at (machine.h); 2048 at most
//   PTX_LOG     a file; at its end the program appends a line for each kernel that has run
//
// The schedule's seed is the emulator's (--seed). A kernel is looked for by its mangled name, which is the same for both
// compilers: programs are linked with -rdynamic.
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "../emulator/core.h"
#include "machine.h"

namespace stacked_lstm::emulator {

namespace {

// What is said of a kernel at the end.
struct Tally {
  uint64_t launches = 0, warp_steps = 0, thread_steps = 0;
  uint64_t compared = 0, different = 0;  // elements
  double farthest = 0;  // the greatest difference, in units in the last place of the number, or of 1 if it is less
};

std::string setting(const char* name, const char* otherwise = "") {
  const char* value = std::getenv(name);
  return value && *value ? value : otherwise;
}

[[noreturn]] void stop(const std::string& why) {
  std::fprintf(stderr, "tests/ptx: %s\n", why.c_str());
  std::exit(2);
}

std::string mangled_name(const void* function) {
  Dl_info info = {};
  if (dladdr(function, &info) == 0 || info.dli_sname == nullptr || info.dli_saddr != function) {
    stop("a kernel without a name: is the program linked with -rdynamic, and the kernel in no anonymous namespace?");
  }
  return info.dli_sname;
}

std::string readable(const std::string& mangled) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status),
                                                    std::free);
  return status == 0 ? name.get() : mangled;
}

class Session {
 public:
  Session() {
    const std::string mode = setting("PTX_MODE", "alone"), sums = setting("PTX_SUMS", "truncated");
    if (mode != "alone" && mode != "compared" && mode != "same") stop("PTX_MODE is " + mode);
    if (sums != "truncated" && sums != "nearest") stop("PTX_SUMS is " + sums);
    emulates_ = mode != "alone", same_ = mode == "same";
    options_.mma_sums = sums == "nearest" ? ptx::MmaSums::nearest : ptx::MmaSums::truncated;
    std::istringstream files(setting("PTX_FILES"));
    for (std::string path; std::getline(files, path, ':');) files_.push_back({path, {}, nullptr});
    if (files_.empty()) stop("PTX_FILES names no file");
  }

  ~Session() {
    const std::string path = setting("PTX_LOG");
    if (path.empty()) return;
    std::ofstream log(path, std::ios::app);
    for (const auto& [name, t] : tallies_) {
      log << name << ' ' << t.launches << ' ' << t.warp_steps << ' ' << t.thread_steps << ' ' << t.compared << ' '
          << t.different << ' ' << t.farthest << '\n';
    }
  }

  Report launch(const Shape& shape, const Kernel& kernel, const std::function<Report()>& emulate) {
    if (options().first_block != 0) stop("a launch of a part of its blocks, which only the emulator can do");
    const std::string name = mangled_name(kernel.function);
    Tally& tally = tallies_[name];
    std::vector<Piece> pieces = device_memory();
    std::vector<std::vector<std::byte>> emulated;
    if (emulates_) {
      std::vector<std::vector<std::byte>> before = contents(pieces);
      const Report report = emulate();
      if (!report.ok()) return report;
      emulated = contents(pieces);
      for (size_t n = 0; n < pieces.size(); ++n) std::copy(before[n].begin(), before[n].end(), writable(pieces[n]));
    }
    Report report;
    try {
      const ptx::Statistics statistics =
          ptx::run(module_of(name), name, launch_of(shape, kernel), ranges_of(pieces), options_for(shape));
      ++tally.launches, tally.warp_steps += statistics.warp_steps, tally.thread_steps += statistics.thread_steps;
    } catch (const ptx::Error& error) {
      report.kind = Kind::trap;
      report.text = "PTX of " + readable(name) + ": " + error.what();
      return report;
    }
    if (emulates_) report.text = compare(pieces, emulated, tally);
    if (!report.text.empty()) report.kind = Kind::trap, report.text = readable(name) + ": " + report.text;
    return report;
  }

 private:
  struct File {
    std::string path, text;
    std::unique_ptr<ptx::Module> module;
  };

  // Files are long: only those that are needed are taken apart.
  const ptx::Module& module_of(const std::string& entry) {
    for (File& file : files_) {
      if (file.text.empty()) {
        std::ifstream stream(file.path);
        if (!stream) stop("no file " + file.path);
        std::ostringstream all;
        all << stream.rdbuf();
        file.text = all.str();
      }
      if (file.text.find(".entry " + entry + "(") == std::string::npos) continue;
      if (!file.module) file.module = std::make_unique<ptx::Module>(file.text, file.path);
      return *file.module;
    }
    throw ptx::Error("no file has this kernel");
  }

  ptx::Options options_for(const Shape& shape) const {
    ptx::Options options = options_;
    const uint64_t threads =
        uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z * shape.block.x * shape.block.y * shape.block.z;
    options.order = threads <= most_ordered_;
    options.seed = emulator::options().seed;
    options.shared_per_block = static_cast<unsigned>(emulator::options().device.shared_per_block);
    return options;
  }

  static ptx::Launch launch_of(const Shape& shape, const Kernel& kernel) {
    ptx::Launch launch;
    launch.grid[0] = shape.grid.x, launch.grid[1] = shape.grid.y, launch.grid[2] = shape.grid.z;
    launch.block[0] = shape.block.x, launch.block[1] = shape.block.y, launch.block[2] = shape.block.z;
    launch.shared_bytes = shape.shared_bytes, launch.cluster = shape.cluster;
    for (const auto& argument : kernel.arguments) {
      const auto* bytes = reinterpret_cast<const uint8_t*>(argument.data());
      launch.parameters.emplace_back(bytes, bytes + argument.size());
    }
    return launch;
  }

  ptx::Ranges& ranges_of(const std::vector<Piece>& pieces) {
    ranges_.clear();
    for (const Piece& piece : pieces) {
      ranges_.add(piece.begin, piece.bytes, piece.name,
                  piece.access == Access::read ? ptx::Ranges::Access::read : ptx::Ranges::Access::read_write);
    }
    return ranges_;
  }

  // What a piece is lent for, the program has not promised to leave alone.
  static std::byte* writable(const Piece& piece) { return static_cast<std::byte*>(const_cast<void*>(piece.begin)); }

  // Of the pieces that a launch may write; the others are empty.
  static std::vector<std::vector<std::byte>> contents(const std::vector<Piece>& pieces) {
    std::vector<std::vector<std::byte>> all;
    for (const Piece& piece : pieces) {
      const std::byte* begin = writable(piece);
      all.emplace_back(begin, piece.access == Access::read_write ? begin + piece.bytes : begin);
    }
    return all;
  }

  // What is not as the emulator left it, where that is wrong.
  std::string compare(const std::vector<Piece>& pieces, const std::vector<std::vector<std::byte>>& emulated,
                      Tally& tally) {
    std::string first;
    for (size_t n = 0; n < pieces.size(); ++n) {
      const Piece& piece = pieces[n];
      const std::byte *got = writable(piece), *wanted = emulated[n].data();
      const size_t width = piece.width;
      for (size_t at = 0; at + width <= emulated[n].size(); at += width) {
        ++tally.compared;
        if (std::memcmp(got + at, wanted + at, width) == 0) continue;
        ++tally.different;
        if (piece.number) {
          const double is = piece.number(got + at), was = piece.number(wanted + at);
          if (std::isnan(is) && std::isnan(was)) {
            --tally.different;
            continue;
          }
          tally.farthest =
              std::max(tally.farthest, std::fabs(is - was) / (piece.epsilon * std::max(1.0, std::fabs(was))));
        }
        if (first.empty()) {
          first = "element " + std::to_string(at / width) + " of " + piece.name + " is " + hex(got + at, width) +
                  ", on the emulator " + hex(wanted + at, width);
        }
      }
    }
    return same_ ? first : "";
  }

  static std::string hex(const std::byte* bytes, size_t width) {
    std::string text;
    char digits[3];
    for (size_t n = width; n-- > 0;) {
      std::snprintf(digits, sizeof digits, "%02x", std::to_integer<unsigned>(bytes[n]));
      text += digits;
    }
    return "0x" + text;
  }

  bool emulates_ = false, same_ = false;
  ptx::Options options_;
  uint64_t most_ordered_ = std::strtoull(setting("PTX_ORDER", "0").c_str(), nullptr, 10);
  ptx::Ranges ranges_;
  std::vector<File> files_;
  std::map<std::string, Tally> tallies_;
};

// Before main() has begun.
const bool installed = [] {
  launcher() = [](const Shape& shape, const Kernel& kernel, const std::function<Report()>& emulate) {
    static Session session;
    return session.launch(shape, kernel, emulate);
  };
  return true;
}();

}  // namespace

}  // namespace stacked_lstm::emulator
