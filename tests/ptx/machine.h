// tests/ptx/machine.h: runs what nvcc makes of a kernel, its PTX, on the host: a machine that takes nothing for granted.
//
//   syntax.cpp      PTX text -> statements with written operands            knows the syntax, and no opcode
//   decode.cpp      each statement -> a function and checked operands       with arithmetic.cpp, conversion.cpp, meeting.cpp,
//                                                                           matrix.cpp: every opcode that the package uses
//   memory.cpp      named ranges of global memory, shared memory by byte    knows which accesses are allowed
//   async.cpp       mbarriers, pushes, asynchronous copies                  lands them late and in random order
//   order.cpp       happens-before, by scopes and fences                    on demand: knows what orders two accesses
//   machine.cpp     warps, barriers, clusters, the schedule                 a run is a function of its seed
//
// Where the PTX ISA calls something undefined, or leaves a precondition to the program, the machine stops with an error
// that names the line of PTX, the line of CUDA that it came from, and the thread. It stands beside tests/emulator, which
// runs the same kernels' C++: the emulator knows the memory model and the protocols, and replaces the inline PTX; this
// machine executes the inline PTX, and what the compiler made of everything around it. A write is seen by all threads at once
// (asynchronous copies excepted); on demand, accesses that nothing orders are errors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace ptx {

// What the machine found. `what()` is the whole report.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Global memory that a launch may touch. Everything else is out of bounds. Ranges do not overlap; add() throws if they do.
class Ranges {
 public:
  enum class Access { read, read_write };
  void add(const void* begin, size_t bytes, std::string name, Access access = Access::read_write);
  void clear();

  struct Range {
    uint64_t begin, end;
    std::string name;
    Access access;
    std::vector<uint8_t> touched;  // in this launch: marks of each byte, see state.h
  };
  std::vector<Range>& all() { return ranges_; }

 private:
  std::vector<Range> ranges_;  // by address
};

// How the sums of products inside an mma are rounded; the ISA leaves it open.
enum class MmaSums {
  truncated,  // terms aligned with the largest and cut, as tensor cores are seen to do: the emulator's arithmetic
  nearest,    // one rounding, of the exact sum
};

struct Options {
  uint64_t seed = 1;  // of the schedule, and of when asynchronous copies land
  MmaSums mma_sums = MmaSums::truncated;
  uint64_t most_steps = uint64_t{1} << 34;  // instructions of a warp, all warps together
  // Whether accesses that nothing orders are errors (order.h). Of small launches: it takes time and memory.
  bool order = false;
  unsigned shared_per_block = 227 << 10;  // the most that a launch may ask for, static memory included
};

struct Launch {
  unsigned grid[3] = {1, 1, 1}, block[3] = {1, 1, 1};
  size_t shared_bytes = 0;                       // dynamic
  unsigned cluster = 1;                          // blocks, consecutive in x
  std::vector<std::vector<uint8_t>> parameters;  // each parameter's bytes
};

struct Statistics {
  uint64_t warp_steps = 0, thread_steps = 0, collectives = 0, copies = 0;
};

class Program;
struct File;

// The kernels of one PTX file, decoded. Opcodes that the machine does not know are errors when a kernel is decoded: all of
// its instructions are, whether they are reached or not.
class Module {
 public:
  // Throws Error with the line that is wrong.
  explicit Module(const std::string& path);
  Module(std::string_view text, const std::string& name);
  ~Module();
  Module(Module&&) noexcept;

  std::vector<std::string> entries() const;  // mangled names
  bool has(const std::string& entry) const;
  // Decodes it at the first call.
  const Program& program(const std::string& entry) const;
  const std::string& target() const;  // "sm_90a"
  const File& file() const;           // as it was read

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Runs one launch to its end. Throws Error: the first thing that is wrong, or that nothing can go on, with who waits for what.
Statistics run(const Module& module, const std::string& entry, const Launch& launch, Ranges& memory,
               const Options& options);

}  // namespace ptx
