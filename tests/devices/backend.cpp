// A second kind of device for torch, which every machine has: its memory is the host's, and its kernels are the CPU's.
//
// What it shares with a GPU: tensors of its own kind, which no operation may mix with the CPU's or with another
// device's; two devices; backward passes in threads of their own. It has no queue, so that it shows no timing.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <string>

namespace {

constexpr auto kKind = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kDevices = 2;
thread_local c10::DeviceIndex current_device = 0;

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* begin = bytes == 0 ? nullptr : std::malloc(bytes);
    return {begin, begin, &std::free, c10::Device(kKind, current_device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Memory memory;
REGISTER_ALLOCATOR(kKind, &memory);

// Everything runs at once, so that streams and events have nothing to do.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kKind; }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before = getDevice();
    current_device = device.index();
    return before;
  }
  c10::Device getDevice() const override { return c10::Device(kKind, current_device); }
  void setDevice(c10::Device device) const override { current_device = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current_device = device.index(); }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }
  c10::Stream getStream(c10::Device device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, device.has_index() ? device : getDevice());
  }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  // The CPU's generators, so that random numbers are the CPU's, too.
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<at::CPUGeneratorImpl>(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::StorageImpl* impl = storage.unsafeGetStorageImpl();
    c10::DataPtr grown = memory.allocate(bytes);
    std::memcpy(grown.get(), impl->data(), std::min(bytes, impl->nbytes()));
    impl->set_data_ptr_noswap(std::move(grown));
    impl->set_nbytes(bytes);
  }
};

const bool hooked = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

// The same memory as a tensor of the CPU, for the time of one call.
at::Tensor on_cpu(const at::Tensor& tensor) {
  if (tensor.is_cpu()) {
    return tensor;
  }
  auto options = tensor.options().device(at::kCPU).requires_grad(false);
  return at::from_blob(tensor.mutable_data_ptr(), tensor.sizes(), tensor.strides(), [tensor](void*) {}, options);
}

struct OnDevice {
  c10::DeviceIndex before = current_device;
  explicit OnDevice(std::optional<c10::Device> device) {
    if (device.has_value() && device->has_index()) {
      current_device = device->index();
    }
  }
  ~OnDevice() { current_device = before; }
};

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

at::Tensor make_empty(
    at::IntArrayRef sizes,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  OnDevice here(device);
  return at::detail::empty_generic(sizes, &memory, kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor make_empty_strided(
    at::IntArrayRef sizes,
    at::IntArrayRef strides,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>) {
  OnDevice here(device);
  return at::detail::empty_strided_generic(sizes, strides, &memory, kKeys, c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) {
    to.resize_(from.sizes());
  }
  return copy_from(from, to, false);
}

at::Scalar read_number(const at::Tensor& tensor) { return on_cpu(tensor).item(); }

at::Tensor as_strided(
    const at::Tensor& tensor,
    c10::SymIntArrayRef sizes,
    c10::SymIntArrayRef strides,
    std::optional<c10::SymInt> offset) {
  std::optional<int64_t> begin;
  if (offset.has_value()) {
    begin = offset->expect_int();
  }
  return at::cpu::as_strided(tensor, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), begin);
}

at::Tensor view(const at::Tensor& tensor, c10::SymIntArrayRef wanted) {
  auto sizes = at::infer_size_dv(C10_AS_INTARRAYREF_SLOW(wanted), tensor.numel());
  auto strides = at::detail::computeStride(tensor.sizes(), tensor.strides(), sizes);
  TORCH_CHECK(strides.has_value(), "view size is not compatible with input tensor's size and stride");
  return at::cpu::as_strided(tensor, sizes, *strides, tensor.storage_offset());
}

at::Tensor reshape_alias(const at::Tensor& tensor, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides) {
  return at::cpu::as_strided(
      tensor, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), tensor.storage_offset());
}

const at::Tensor& resize(const at::Tensor& tensor, c10::SymIntArrayRef sizes, std::optional<at::MemoryFormat>) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(sizes));
  const size_t needed = (impl->numel() + impl->storage_offset()) * impl->itemsize();
  if (impl->storage().nbytes() < needed) {
    Hooks().resizePrivateUse1Bytes(impl->storage(), needed);
  }
  return tensor;
}

at::Tensor& set_storage(
    at::Tensor& tensor, c10::Storage storage, int64_t offset, at::IntArrayRef sizes, at::IntArrayRef strides) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_offset(offset);
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(sizes, strides);
  return tensor;
}

at::Tensor& set_tensor(at::Tensor& tensor, const at::Tensor& other) {
  return set_storage(tensor, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}

// What a GPU refuses: operands on the host, or on another device. Single numbers of the host are taken as arguments by
// elementwise operations, and positions may come from the host, which takes a copy.
void check_devices(const std::string& name, const c10::Stack& arguments) {
  auto begins = [&name](const char* prefix) { return name.rfind(prefix, 0) == 0; };
  const bool indexes = begins("aten::index.") || begins("aten::index_put") || begins("aten::_index_put_impl_");
  const bool strict = begins("aten::cat") || begins("aten::stack") || begins("aten::_foreach") ||
      begins("aten::index_") || begins("aten::scatter") || begins("aten::gather") || begins("aten::lerp");
  std::optional<c10::Device> home;
  auto look = [&](const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.is_cpu()) {
      return;
    }
    TORCH_CHECK(!home.has_value() || *home == tensor.device(), name, " mixes ", *home, " and ", tensor.device());
    home = tensor.device();
  };
  auto look_at_host = [&](const at::Tensor& tensor) {
    if (tensor.defined() && tensor.is_cpu()) {
      const bool taken = indexes || (tensor.dim() == 0 && !strict);
      TORCH_CHECK(taken, name, " mixes ", *home, " and the CPU, shape ", tensor.sizes());
    }
  };
  auto each = [&](auto&& what) {
    for (const c10::IValue& value : arguments) {
      if (value.isTensor()) {
        what(value.toTensor());
      } else if (value.isTensorList()) {
        for (const at::Tensor& tensor : value.toTensorVector()) {
          what(tensor);
        }
      } else if (value.isOptionalTensorList()) {
        for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
          if (tensor.has_value()) {
            what(*tensor);
          }
        }
      }
    }
  };
  each(look);
  if (home.has_value()) {
    each(look_at_host);
  }
}

void fallback(const c10::OperatorHandle& op, c10::Stack* stack) {
  check_devices(toString(op.operator_name()), torch::jit::last(*stack, op.schema().arguments().size()).vec());
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &make_empty);
  library.impl("empty_strided", &make_empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &read_number);
  library.impl("as_strided", &as_strided);
  library.impl("view", &view);
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("resize_", &resize);
  library.impl("set_.source_Storage_storage_offset", &set_storage);
  library.impl("set_.source_Tensor", &set_tensor);
}
