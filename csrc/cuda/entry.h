// What every CUDA operator does around its launches.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace fastmargin::cuda {

// Makes the tensor's device current (else the kernel would run on cuda:0), and holds the stream.
//
// The stream comes from the caller, since the functions of torch that name the current CUDA stream
// are in libtorch_cuda: an extension compiled beside a CPU build of torch could not be loaded.
class Entry {
 public:
  Entry(const torch::stable::Tensor& tensor, int64_t stream)
      : guard_(tensor.get_device_index()), stream_(reinterpret_cast<cudaStream_t>(stream)) {}

  cudaStream_t stream() const { return stream_; }

  void check(cudaError_t error, const char* name) const {
    STD_TORCH_CHECK(error == cudaSuccess, "fastmargin: launching ", name,
                    " failed: ", cudaGetErrorString(error));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace fastmargin::cuda
