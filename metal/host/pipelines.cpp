#include "metal/host/pipelines.hpp"

#include <string>

#include "metal/host/errors.hpp"
#include "metal/host/kernel_source.hpp"

namespace moesaic::metal {
namespace {

NS::String* string_of(const char* text) { return NS::String::string(text, NS::UTF8StringEncoding); }

}  // namespace

MTL::ComputePipelineState* Pipelines::get(Kernel kernel, const Constants& constants) {
  const std::lock_guard lock(mutex_);
  auto& pipeline = pipelines_[{kernel, constants}];
  if (!pipeline) pipeline = compile(kernel, constants);
  return pipeline.get();
}

MTL::Library* Pipelines::library() {
  if (library_) return library_.get();
  const auto options = NS::TransferPtr(MTL::CompileOptions::alloc()->init());
  options->setFastMathEnabled(false);  // it would assume that there are no NaNs
  options->setLanguageVersion(MTL::LanguageVersion3_0);
  NS::Error* error = nullptr;
  library_ = NS::TransferPtr(device_->newLibrary(string_of(kKernelSource), options.get(), &error));
  require<DeviceError>(library_.get() != nullptr, [&] {
    return Problem{"metal", "kernels", "source that compiles", text_of(error),
                   "Metal 3 needs macOS 13 or later"};
  });
  return library_.get();
}

NS::SharedPtr<MTL::ComputePipelineState> Pipelines::compile(Kernel kernel,
                                                            const Constants& constants) {
  const AutoreleaseScope scope;
  const std::string name(name_of(kernel));
  const auto values = NS::TransferPtr(MTL::FunctionConstantValues::alloc()->init());
  const auto set = [&](std::int32_t value, int index) {
    values->setConstantValue(&value, MTL::DataTypeInt, static_cast<NS::UInteger>(index));
  };
  set(constants.input, metal_args::kConstantInput);
  set(constants.output, metal_args::kConstantOutput);
  set(constants.activation, metal_args::kConstantActivation);

  NS::Error* error = nullptr;
  const auto function =
      NS::TransferPtr(library()->newFunction(string_of(name.c_str()), values.get(), &error));
  require<DeviceError>(function.get() != nullptr, [&] {
    return Problem{"metal", name, "a kernel of the library", text_of(error), ""};
  });
  auto pipeline = NS::TransferPtr(device_->newComputePipelineState(function.get(), &error));
  require<DeviceError>(pipeline.get() != nullptr,
                       [&] { return Problem{"metal", name, "a pipeline", text_of(error), ""}; });
  require<DeviceError>(pipeline->threadExecutionWidth() == metal_args::kSimdWidth, [&] {
    return Problem{"metal", name,
                   "simdgroups of " + std::to_string(metal_args::kSimdWidth) + " threads",
                   std::to_string(pipeline->threadExecutionWidth()), "an Apple GPU is needed"};
  });
  return pipeline;
}

}  // namespace moesaic::metal
