// What torch asks about a GPU while it records a backward over fake CUDA tensors: one device, its one stream, no memory.
// Loaded before torch is imported; a torch that is built for CUDA has all of this itself.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {
namespace {

const Device device(kCUDA, 0);
const c10::Stream stream(c10::Stream::DEFAULT, device);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<kCUDA> {
  Device getDevice() const override { return device; }
  Device exchangeDevice(Device) const override { return device; }
  c10::Stream getStream(Device) const noexcept override { return stream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream; }
};

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};

REGISTER_CUDA_HOOKS(CUDAHooks);
c10::impl::DeviceGuardImplRegistrar guard(kCUDA, new Guard);

}  // namespace
}  // namespace at
