#include "metal/host/pipelines.hpp"

#include <string>

#include "metal/host/errors.hpp"
#include "metal/host/kernel_source.hpp"
#include "metal/host/system.hpp"

namespace moesaic::metal {
namespace {

NS::String* string_of(const char* text) { return NS::String::string(text, NS::UTF8StringEncoding); }

}  // namespace

MTL::ComputePipelineState* Pipelines::get(Kernel kernel, const Constants& constants) {
  const std::pair key{kernel, constants};
  {
    const std::lock_guard lock(mutex_);
    const auto found = pipelines_.find(key);
    if (found != pipelines_.end()) return found->second.get();
  }
  NS::SharedPtr<MTL::ComputePipelineState> made = compile(kernel, constants);
  const std::lock_guard lock(mutex_);
  return pipelines_.try_emplace(key, std::move(made)).first->second.get();
}

NS::SharedPtr<MTL::Library> Pipelines::library() {
  {
    const std::lock_guard lock(mutex_);
    if (library_) return library_;
  }
  const auto options = NS::TransferPtr(MTL::CompileOptions::alloc()->init());
  // Fast math would assume that there are no NaNs. The older switch is deprecated where there is the
  // newer one, which also says what exp means without precise::.
  if (is_macos(15)) {
    options->setMathMode(MTL::MathModeSafe);
    options->setMathFloatingPointFunctions(MTL::MathFloatingPointFunctionsPrecise);
  } else {
    options->setFastMathEnabled(false);
  }
  options->setLanguageVersion(MTL::LanguageVersion3_0);
  NS::Error* error = nullptr;
  NS::SharedPtr<MTL::Library> made =
      NS::TransferPtr(device_->newLibrary(string_of(kKernelSource), options.get(), &error));
  require<DeviceError>(made.get() != nullptr, [&] {
    return Problem{"metal", "kernels", "source that compiles", text_of(error),
                   "Metal 3 needs macOS 13 or later"};
  });
  const std::lock_guard lock(mutex_);
  if (!library_) library_ = std::move(made);
  return library_;
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
  set(constants.tile, metal_args::kConstantTile);

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
