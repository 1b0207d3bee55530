// Apple's GPU as PyTorch's dispatcher sees it, where there is none. Its tensors lie in the computer's memory, as on a
// Mac, and the CPU's kernels compute on them, but of those operators alone that are named by `has_kernel`: all others
// are refused, as are float64 and tensors of two devices in one operation.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/_scaled_dot_product_attention_math_for_mps.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;
const c10::Device THERE{c10::kMPS, 0};

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* host = c10::GetCPUAllocator();
    void* data = host->raw_allocate(bytes);
    return {data, data, host->raw_deleter(), THERE};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} memory;

const at::Generator& generator() {
  static at::Generator only = at::make_generator<at::CPUGeneratorImpl>(1);
  return only;
}

}  // namespace

// ---- the device -----------------------------------------------------------------------------------------------------

struct MPSHooks final : at::MPSHooksInterface {
  void init() const override {}
  bool hasMPS() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isOnMacOSorNewer(unsigned, unsigned) const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Device getDeviceFromPtr(void*) const override { return THERE; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return generator().clone(); }
  c10::Allocator* getMPSDeviceAllocator() const override { return &memory; }
  void deviceSynchronize() const override {}
  void emptyCache() const override {}
  size_t getCurrentAllocatedMemory() const override { return 0; }
  size_t getDriverAllocatedMemory() const override { return 0; }
  size_t getRecommendedMaxMemory() const override { return size_t(12) << 30; }
};

namespace at {
REGISTER_MPS_HOOKS(MPSHooks)
}

namespace {

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::MPS> {
  c10::Device exchangeDevice(c10::Device) const override { return THERE; }
  c10::Device getDevice() const override { return THERE; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, THERE); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(THERE); }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    static int happened;
    *event = &happened;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
};
c10::impl::DeviceGuardImplRegistrar registered(c10::DeviceType::MPS, new Guard());

// ---- its tensors ----------------------------------------------------------------------------------------------------

bool there(const Tensor& t) { return t.defined() && t.device().type() == c10::kMPS; }

c10::ScalarType known(c10::ScalarType type) {
  TORCH_CHECK_TYPE(type != at::kDouble && type != at::kComplexDouble,
                   "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
                   "Please use float32 instead.");
  return type;
}

const c10::DispatchKeySet KEY{c10::DispatchKey::MPS};

Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic_symint(size, &memory, KEY, known(c10::dtype_or_default(type)), format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> type,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_symint_generic(size, stride, &memory, KEY, known(c10::dtype_or_default(type)));
}

const Tensor& resize(const Tensor& t, at::IntArrayRef size) {
  if (t.sizes() == size) return t;
  auto* inner = t.unsafeGetTensorImpl();
  inner->set_sizes_contiguous(size);
  size_t bytes = (inner->storage_offset() + inner->numel()) * inner->itemsize(), before = inner->storage().nbytes();
  if (bytes > before) {
    c10::DataPtr data = memory.allocate(bytes);
    if (before) std::memcpy(data.get(), inner->storage().data(), before);
    inner->unsafe_storage().set_data_ptr_noswap(std::move(data));
    inner->unsafe_storage().set_nbytes(bytes);
  }
  return t;
}

const Tensor& resize_(const Tensor& t, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  return resize(t, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor& set_part(Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                 c10::SymIntArrayRef stride) {
  auto* inner = self.unsafeGetTensorImpl();
  inner->set_storage_keep_dtype(std::move(source));
  if (stride.size() == size.size()) {
    inner->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  } else {
    inner->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
    inner->set_storage_offset(offset.expect_int());
  }
  return self;
}

Tensor& set_whole(Tensor& self, at::Storage source) {
  c10::SymInt count(int64_t(source.nbytes() / self.itemsize()));
  return set_part(self, std::move(source), 0, {&count, 1}, {});
}

// The same memory as a tensor of the CPU.
Tensor on_host(const Tensor& t) {
  if (!there(t)) return t;
  auto* kept = new c10::Storage(t.storage());
  c10::Storage same(c10::Storage::use_byte_size_t(), kept->nbytes(),
                    c10::DataPtr(kept->mutable_data(), kept, [](void* p) { delete static_cast<c10::Storage*>(p); },
                                 c10::kCPU));
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(same), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                      t.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return out;
}

Maybe on_host(const Maybe& t) { return t ? Maybe(on_host(*t)) : std::nullopt; }

// What a kernel of the CPU made, as a tensor there.
Tensor made(const Tensor& host) {
  if (!host.defined()) return host;
  Tensor out = at::detail::empty_strided_generic(host.sizes(), host.strides(), &memory, KEY,
                                                 known(host.scalar_type()));
  on_host(out).copy_(host);
  return out;
}

// What a kernel of the CPU showed of a tensor there.
Tensor view_of(const Tensor& base, const Tensor& host) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()),
                                                      base.key_set(), host.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  return out;
}

// ---- its kernels ----------------------------------------------------------------------------------------------------

void kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = c10::toString(schema.operator_name());
  const auto count = schema.arguments().size();
  auto arguments = torch::jit::pop(*stack, count);
  const auto originals = arguments;
  bool here = false, elsewhere = false;
  static const auto drawing = c10::OptionalType::create(c10::GeneratorType::get());
  auto convert = [&](const Tensor& t) {
    here = here || there(t);
    elsewhere = elsewhere || (t.defined() && !there(t) && t.dim() > 0);  // a number of the CPU goes with the call
    return on_host(t);
  };
  for (size_t n = 0; n < count; n++) {
    auto& argument = arguments[n];
    if (argument.isTensor() && schema.arguments()[n].is_out() && there(argument.toTensor())) {
      argument = at::detail::empty_cpu({0}, argument.toTensor().scalar_type());
    } else if (argument.isTensor()) {
      argument = convert(argument.toTensor());
    } else if (argument.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : argument.toTensorList()) list.push_back(convert(t));
      argument = list;
    } else if (argument.isOptionalTensorList()) {
      c10::List<Maybe> list;
      for (const Maybe& t : argument.toOptionalTensorList()) list.push_back(t ? Maybe(convert(*t)) : std::nullopt);
      argument = list;
    } else if (argument.isNone() && *schema.arguments()[n].type() == *drawing) {
      argument = generator();  // of which the seed is the device's own
    } else if (argument.isDevice() && argument.toDevice().type() == c10::kMPS) {
      argument = c10::Device(c10::kCPU);
    }
  }
  // What is copied comes from anywhere, and so do indices.
  TORCH_CHECK(!(here && elsewhere) || name.find("copy") != name.npos || name.find("index") != name.npos, name,
              ": Expected all tensors to be on the same device");
  for (auto& argument : arguments) stack->push_back(argument);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  auto results = torch::jit::pop(*stack, schema.returns().size());
  for (size_t n = 0; n < results.size(); n++) {
    const auto* alias = schema.returns()[n].alias_info();
    size_t same = count;  // the argument that it is, or that it shows a part of
    for (size_t a = 0; alias && a < count; a++) {
      const auto* of = schema.arguments()[a].alias_info();
      if (of && of->beforeSets() == alias->beforeSets()) same = a;
    }
    if (same < count && alias->isWrite()) {
      const Tensor& original = originals[same].toTensor();
      if (schema.arguments()[same].is_out() && there(original)) {
        on_host(resize(original, results[n].toTensor().sizes())).copy_(results[n].toTensor());
      }
      stack->push_back(original);
    } else if (same < count && results[n].isTensor() && there(originals[same].toTensor())) {
      stack->push_back(view_of(originals[same].toTensor(), results[n].toTensor()));
    } else if (results[n].isTensor()) {
      stack->push_back(made(results[n].toTensor()));
    } else if (results[n].isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& t : results[n].toTensorList()) list.push_back(made(t));
      stack->push_back(list);
    } else {
      stack->push_back(results[n]);
    }
  }
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask,
                                     double dropout, bool causal, const Maybe& dropped, std::optional<double> scale,
                                     bool grouped) {
  auto [out, weights] = at::_scaled_dot_product_attention_math(on_host(q), on_host(k), on_host(v), on_host(mask),
                                                               dropout, causal, on_host(dropped), scale, grouped);
  return {made(out), made(weights)};
}

// The choice of PyTorch's attention.cpp where it is built for a Mac.
Tensor chosen_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask, double dropout,
                        bool causal, std::optional<double> scale, bool grouped) {
  Maybe added = mask;
  if (mask && mask->scalar_type() == at::kBool) {
    added = at::zeros_like(*mask, q.scalar_type()).masked_fill_(mask->logical_not(), -INFINITY);
  }
  const bool learns = at::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() || v.requires_grad());
  auto compute = dropout == 0 && !learns ? at::_scaled_dot_product_attention_math_for_mps
                                         : at::_scaled_dot_product_attention_math;
  return std::get<0>(compute(q, k, v, added, dropout, causal, std::nullopt, scale, grouped));
}

void without(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "The operator '", op.schema().operator_name(),
                              "' is not currently implemented for the MPS device.");
}

TORCH_LIBRARY_IMPL(_, MPS, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&without>()); }

TORCH_LIBRARY_IMPL(aten, AutogradMPS, m) { m.impl("scaled_dot_product_attention", TORCH_FN(chosen_attention)); }

TORCH_LIBRARY_IMPL(aten, MPS, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("resize_", TORCH_FN(resize_));
  m.impl("set_.source_Storage", TORCH_FN(set_whole));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_part));
  m.impl("scaled_dot_product_attention", TORCH_FN(chosen_attention));
  m.impl("_scaled_dot_product_attention_math_for_mps", TORCH_FN(attention));
}

}  // namespace

extern "C" void has_kernel(const char* name) {
  static auto* library = new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::MPS, __FILE__, __LINE__);
  library->impl(name, torch::CppFunction::makeFromBoxedFunction<&kernel>());
}
