// The keyed permutation as an operator, fastmargin::cpu_permutation. What is computed, and why, is
// in fastmargin/backends/_permutation.py; every backend gives the same numbers.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../checks.h"
#include "capability.h"

namespace fastmargin::cpu {
namespace {

constexpr int kRounds = 12;
constexpr int64_t kBlock = 256;  // numbers that go through the rounds together, in vectors
constexpr int64_t kGrain = 16 * kBlock;
constexpr int64_t kMaxSide = int64_t{1} << 30;

struct Network {
  uint32_t side;
  uint32_t round_key[kRounds];
};

inline uint32_t mix(uint32_t h) {
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  return h ^ (h >> 16);
}

Network network(const int64_t* key, int64_t side) {
  Network net;
  net.side = static_cast<uint32_t>(side);
  for (int i = 0; i < kRounds; ++i) {
    uint32_t h = (i + 1) * 0x9e3779b9u;
    for (int word = 0; word < 4; ++word) {
      h = mix(h ^ static_cast<uint32_t>(static_cast<uint64_t>(key[word / 2]) >> 32 * (word % 2)));
    }
    net.round_key[i] = h;
  }
  return net;
}

// digit[j] += hash(other[j]) modulo side, for a whole block so that the loop becomes vectors.
[[gnu::always_inline]] inline void add_hash(uint32_t* __restrict digit,
                                            const uint32_t* __restrict other, uint32_t round_key,
                                            uint32_t side) {
  for (int64_t j = 0; j < kBlock; ++j) {
    const uint64_t product = static_cast<uint64_t>(mix(other[j] + round_key)) * side;
    const uint32_t sum = digit[j] + static_cast<uint32_t>(product >> 32);
    digit[j] = std::min(sum, sum - side);  // wraps to a large number where sum is below side
  }
}

[[gnu::always_inline]] inline void rounds(const Network& net, uint32_t* left, uint32_t* right) {
  for (int i = 0; i < kRounds; i += 2) {
    add_hash(left, right, net.round_key[i], net.side);
    add_hash(right, left, net.round_key[i + 1], net.side);
  }
}

void pass(const Network& net, uint32_t* left, uint32_t* right) { rounds(net, left, right); }

#if defined(__x86_64__)
[[gnu::target("avx2")]] void pass_avx2(const Network& net, uint32_t* left, uint32_t* right) {
  rounds(net, left, right);
}

auto* chosen_pass() { return capability() >= Capability::kAvx2 ? pass_avx2 : pass; }
#else
auto* chosen_pass() { return pass; }
#endif

// Images of begin .. end - 1. Places in the block that a finished number leaves are filled with the
// next ones, so a pass is full until the last.
void write_images(const Network& net, int64_t size, int64_t begin, int64_t end, int64_t* out) {
  uint32_t left[kBlock] = {}, right[kBlock] = {};
  int64_t source[kBlock];
  const int64_t side = net.side;
  auto* const run = chosen_pass();
  int64_t next = begin, held = 0;
  // digits of `next`, counted on instead of divided
  uint32_t next_left = static_cast<uint32_t>(begin / side);
  uint32_t next_right = static_cast<uint32_t>(begin % side);
  while (held > 0 || next < end) {
    for (; held < kBlock && next < end; ++held, ++next) {
      left[held] = next_left;
      right[held] = next_right;
      source[held] = next;
      const bool carry = ++next_right == net.side;
      next_right = carry ? 0 : next_right;
      next_left += carry;
    }
    run(net, left, right);
    int64_t outside = 0;
    for (int64_t j = 0; j < held; ++j) {
      const int64_t value = left[j] * side + right[j];
      out[source[j]] = value;  // of a number that goes on, overwritten later
      left[outside] = left[j];
      right[outside] = right[j];
      source[outside] = source[j];
      outside += value >= size;
    }
    held = outside;
  }
}

void permutation(const Tensor& key, int64_t size, int64_t side, const Tensor& out) {
  const int64_t count = out.numel();
  STD_TORCH_CHECK(
      0 <= count && count <= size && 0 < side && side <= kMaxSide && size <= side * side,
      "fastmargin: count <= size <= side^2 <= 2^60 expected");
  const Network net = network(checked<const int64_t>(key, 2, key, "key"), side);
  int64_t* to = checked<int64_t>(out, count, key, "out");
  torch::stable::parallel_for(0, count, kGrain, [&](int64_t begin, int64_t end) {
    write_images(net, size, begin, end, to);
  });
}

}  // namespace
}  // namespace fastmargin::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastmargin, m) {
  m.def("cpu_permutation(Tensor key, int size, int side, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastmargin, CPU, m) {
  m.impl("cpu_permutation", TORCH_BOX(&fastmargin::cpu::permutation));
}
