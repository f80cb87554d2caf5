// Runs CUDA source on the CPU, for tests only: stands in for <cuda_runtime.h> under g++.
//
// Each thread of a block is a fiber (ucontext). A fiber runs until it meets a barrier, a shuffle or
// the end of the kernel; when none can go on, whatever is complete is released. Blocks run one
// after the other. What this is for, besides the arithmetic:
//
// - shared memory is filled with 0xff (NaN) before every block;
// - a barrier that not all threads reach, or reach at different lines, a shuffle whose mask names
//   lanes that do not take part, a deadlock: the launch fails, saying who waits where;
// - threads and blocks can run in several orders (set_order): a missing barrier changes the result.
//
// Not covered: the memory model, timing, warps that run in lockstep, device intrinsics of
// cuda_fp16.h, dynamic shared memory.
//
// Shared variables become the only thread_local variables of the library that includes this, so
// that their storage can be found as a whole and filled. Compile with -fvisibility=hidden: two
// libraries in a process would else have their statics in common.
#pragma once

#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

namespace cuda_on_cpu {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kGuardBytes = 4096;

struct Site {
  const char* operation;
  const char* file;
  int line;

  bool operator==(const Site& other) const {
    return line == other.line && !std::strcmp(operation, other.operation) &&
           !std::strcmp(file, other.file);
  }
  std::string text() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(operation) + " at " + (slash ? slash + 1 : file) + ":" +
           std::to_string(line);
  }
};

enum class State { kReady, kBarrier, kWarp, kDone };

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  State state = State::kReady;
  Site site = {};
  unsigned mask = 0;
  uint64_t given = 0;              // what this lane brings to a warp operation
  uint64_t lanes[kWarpSize] = {};  // what all lanes brought, once it is complete
};

// Makes the library own thread-local storage, whether or not a kernel has shared variables.
inline thread_local char shared_anchor;

// All shared variables of this library.
struct SharedMemory {
  void* begin = nullptr;
  size_t bytes = 0;

  static SharedMemory find() {
    shared_anchor = 0;  // thread-local storage is allocated at its first use
    SharedMemory found;
    dl_iterate_phdr(
        [](dl_phdr_info* library, size_t, void* result) {
          const uintptr_t here = reinterpret_cast<uintptr_t>(&SharedMemory::find);
          bool own = false;
          size_t bytes = 0;
          for (int i = 0; i < library->dlpi_phnum; ++i) {
            const auto& part = library->dlpi_phdr[i];
            const uintptr_t begin = library->dlpi_addr + part.p_vaddr;
            own = own || (part.p_type == PT_LOAD && here - begin < part.p_memsz);
            if (part.p_type == PT_TLS) bytes = part.p_memsz;
          }
          if (own) *static_cast<SharedMemory*>(result) = {library->dlpi_tls_data, bytes};
          return own ? 1 : 0;
        },
        &found);
    return found;
  }
};

enum Order { kForward = 0, kReverse = 1 };  // any other number seeds a shuffle

// The one machine: a block at a time, on the calling thread.
class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  unsigned order = kForward;
  const std::string& error() const { return error_; }

  cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
    error_.clear();
    gridDim = config.gridDim;
    blockDim = config.blockDim;
    const uint64_t threads = uint64_t(blockDim.x) * blockDim.y * blockDim.z;
    const uint64_t blocks = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
    if (threads < 1 || threads > 1024 || blocks < 1 || gridDim.y > 65535 || gridDim.z > 65535) {
      error_ = "invalid configuration: " + std::to_string(blocks) + " blocks of " +
               std::to_string(threads) + " threads";
      return cudaErrorInvalidConfiguration;
    }
    kernel_ = &kernel;
    shared_ = SharedMemory::find();
    if (shared_.begin == nullptr) {
      error_ = "the library's thread-local storage is not found";
      return cudaErrorLaunchFailure;
    }
    for (const uint64_t block : in_order(blocks)) {
      blockIdx = {unsigned(block % gridDim.x), unsigned(block / gridDim.x % gridDim.y),
                  unsigned(block / gridDim.x / gridDim.y)};
      run_block(threads);
      if (!error_.empty()) return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
  }

  // ---- called from within a fiber ----

  void barrier(Site site) { wait(State::kBarrier, site, 0, 0); }

  // What every lane of the mask brought; `mine` is this lane's part.
  const uint64_t* exchange(Site site, unsigned mask, uint64_t mine) {
    if (!(mask >> lane() & 1)) fail(site.text() + ": the mask does not name the calling lane");
    wait(State::kWarp, site, mask, mine);
    return fibers_[current_].lanes;
  }

  int lane() const { return int(current_ % kWarpSize); }

  // Ends the launch: no fiber runs again.
  [[noreturn]] void fail(const std::string& what) {
    error_ = where(current_) + ": " + what;
    swapcontext(&fibers_[current_].context, &scheduler_);
    __builtin_unreachable();
  }

 private:
  std::vector<uint64_t> in_order(uint64_t count) {
    std::vector<uint64_t> items(count);
    for (uint64_t i = 0; i < count; ++i) items[i] = order == kReverse ? count - 1 - i : i;
    if (order > kReverse) std::shuffle(items.begin(), items.end(), std::mt19937(order));
    return items;
  }

  static std::string where(size_t thread) {
    return "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(thread);
  }

  void run_block(size_t threads) {
    std::memset(shared_.begin, 0xff, shared_.bytes);
    if (fibers_.size() < threads) fibers_.resize(threads);
    threads_ = threads;
    for (size_t i = 0; i < threads; ++i) start(fibers_[i]);
    const std::vector<uint64_t> sequence = in_order(threads);
    for (;;) {
      size_t done = 0;
      for (const uint64_t i : sequence) {
        if (fibers_[i].state == State::kReady) resume(i);
        if (!error_.empty()) return;
        done += fibers_[i].state == State::kDone;
      }
      if (done == threads) return;
      if (!release_warps() && !release_barrier()) {
        if (error_.empty()) error_ = "deadlock: " + census();
        return;
      }
    }
  }

  void start(Fiber& fiber) {
    if (fiber.stack == nullptr) {
      fiber.stack = static_cast<char*>(
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      mprotect(fiber.stack, kGuardBytes, PROT_NONE);  // an overflow crashes instead of corrupting
    }
    fiber.state = State::kReady;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, &Machine::body, 0);
  }

  static void body() {
    Machine& machine = get();
    (*machine.kernel_)();
    machine.fibers_[machine.current_].state = State::kDone;
  }

  void resume(size_t i) {
    current_ = i;
    threadIdx = {unsigned(i % blockDim.x), unsigned(i / blockDim.x % blockDim.y),
                 unsigned(i / blockDim.x / blockDim.y)};
    swapcontext(&scheduler_, &fibers_[i].context);
  }

  void wait(State state, Site site, unsigned mask, uint64_t given) {
    Fiber& fiber = fibers_[current_];
    fiber.state = state;
    fiber.site = site;
    fiber.mask = mask;
    fiber.given = given;
    swapcontext(&fiber.context, &scheduler_);
  }

  // Lets go on every group of lanes that wait for each other and are all there.
  bool release_warps() {
    bool any = false;
    for (size_t first = 0; first < threads_; first += kWarpSize) {
      for (size_t lane = 0; lane < kWarpSize && first + lane < threads_; ++lane) {
        const Fiber& leader = fibers_[first + lane];
        if (leader.state != State::kWarp) continue;
        uint64_t brought[kWarpSize] = {};
        bool complete = true;
        for (size_t k = 0; k < kWarpSize && complete; ++k) {
          if (!(leader.mask >> k & 1)) continue;
          complete = first + k < threads_ && fibers_[first + k].state == State::kWarp &&
                     fibers_[first + k].mask == leader.mask &&
                     fibers_[first + k].site == leader.site;
          if (complete) brought[k] = fibers_[first + k].given;
        }
        if (!complete) continue;
        const unsigned mask = leader.mask;
        for (size_t k = 0; k < kWarpSize; ++k) {
          if (!(mask >> k & 1)) continue;
          std::copy(brought, brought + kWarpSize, fibers_[first + k].lanes);
          fibers_[first + k].state = State::kReady;
        }
        any = true;
      }
    }
    return any;
  }

  bool release_barrier() {
    for (size_t i = 0; i < threads_; ++i) {
      if (fibers_[i].state != State::kBarrier) return false;
      if (!(fibers_[i].site == fibers_[0].site)) {
        error_ = "divergent barrier: " + census();
        return false;
      }
    }
    for (size_t i = 0; i < threads_; ++i) fibers_[i].state = State::kReady;
    return true;
  }

  // Who waits where, and who has left.
  std::string census() const {
    struct Group {
      std::string what;
      size_t first, count;
    };
    std::vector<Group> groups;
    for (size_t i = 0; i < threads_; ++i) {
      const Fiber& fiber = fibers_[i];
      std::string what = "left the kernel";
      if (fiber.state != State::kDone) what = "wait in " + fiber.site.text();
      if (fiber.state == State::kWarp) {
        char mask[24];
        std::snprintf(mask, sizeof(mask), " (mask %08x)", fiber.mask);
        what += mask;
      }
      const auto same = [&](const Group& group) { return group.what == what; };
      const auto found = std::find_if(groups.begin(), groups.end(), same);
      if (found == groups.end()) {
        groups.push_back({what, i, 1});
      } else {
        found->count += 1;
      }
    }
    std::string text = "in block " + std::to_string(blockIdx.x);
    for (const Group& group : groups) {
      text += "; " + std::to_string(group.count) + " threads (the first is " +
              std::to_string(group.first) + ") " + group.what;
    }
    return text;
  }

  std::vector<Fiber> fibers_;
  size_t threads_ = 0, current_ = 0;
  ucontext_t scheduler_;
  SharedMemory shared_;
  const std::function<void()>* kernel_ = nullptr;
  std::string error_;
};

template <typename T>
uint64_t pack(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// source(lane, first lane of its segment, end of its segment) -> lane to read, or out of the
// segment for the own value.
template <typename T, typename Source>
T shuffle(Site site, unsigned mask, T value, int width, Source source) {
  Machine& machine = Machine::get();
  const uint64_t* lanes = machine.exchange(site, mask, pack(value));
  const int lane = machine.lane(), begin = lane / width * width, end = begin + width;
  int from = source(lane, begin, end);
  if (from < begin || from >= end) from = lane;
  if (!(mask >> from & 1)) {
    machine.fail(site.text() + ": reads lane " + std::to_string(from) + ", not in the mask");
  }
  return unpack<T>(lanes[from]);
}

template <typename T>
T shuffle_xor(Site site, unsigned mask, T value, int bits, int width = kWarpSize) {
  return shuffle(site, mask, value, width, [=](int lane, int, int) { return lane ^ bits; });
}
template <typename T>
T shuffle_down(Site site, unsigned mask, T value, unsigned delta, int width = kWarpSize) {
  return shuffle(site, mask, value, width, [=](int lane, int, int) { return lane + int(delta); });
}
template <typename T>
T shuffle_up(Site site, unsigned mask, T value, unsigned delta, int width = kWarpSize) {
  return shuffle(site, mask, value, width, [=](int lane, int, int) { return lane - int(delta); });
}
template <typename T>
T shuffle_from(Site site, unsigned mask, T value, int source, int width = kWarpSize) {
  return shuffle(site, mask, value, width,
                 [=](int, int begin, int) { return begin + source % width; });
}

inline unsigned ballot(Site site, unsigned mask, bool vote) {
  const uint64_t* lanes = Machine::get().exchange(site, mask, vote);
  unsigned votes = 0;
  for (int k = 0; k < kWarpSize; ++k) votes |= unsigned(lanes[k] != 0) << k;
  return votes & mask;
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_SITE(name) (cuda_on_cpu::Site{name, __FILE__, __LINE__})
#define __syncthreads() cuda_on_cpu::Machine::get().barrier(CUDA_ON_CPU_SITE("__syncthreads"))
#define __syncwarp(...)                                      \
  ((void)cuda_on_cpu::ballot(CUDA_ON_CPU_SITE("__syncwarp"), \
                             0xffffffffu __VA_OPT__(&) __VA_ARGS__, false))
#define __shfl_xor_sync(...) \
  cuda_on_cpu::shuffle_xor(CUDA_ON_CPU_SITE("__shfl_xor_sync"), __VA_ARGS__)
#define __shfl_down_sync(...) \
  cuda_on_cpu::shuffle_down(CUDA_ON_CPU_SITE("__shfl_down_sync"), __VA_ARGS__)
#define __shfl_up_sync(...) cuda_on_cpu::shuffle_up(CUDA_ON_CPU_SITE("__shfl_up_sync"), __VA_ARGS__)
#define __shfl_sync(...) cuda_on_cpu::shuffle_from(CUDA_ON_CPU_SITE("__shfl_sync"), __VA_ARGS__)
#define __ballot_sync(mask, vote) cuda_on_cpu::ballot(CUDA_ON_CPU_SITE("__ballot_sync"), mask, vote)
#define __any_sync(mask, vote) \
  (cuda_on_cpu::ballot(CUDA_ON_CPU_SITE("__any_sync"), mask, vote) != 0)
#define __all_sync(mask, vote) \
  (cuda_on_cpu::ballot(CUDA_ON_CPU_SITE("__all_sync"), mask, vote) == (mask))

// Fibers change only at the calls above, so plain code is atomic.
template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : cuda_on_cpu::Machine::get().error().c_str();
}

template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Actual&&... args) {
  return cuda_on_cpu::Machine::get().launch(*config,
                                            [&] { kernel(static_cast<Expected>(args)...); });
}
