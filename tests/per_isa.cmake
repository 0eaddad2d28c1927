# Label per_isa: every program of tests/cpp, once for each instruction set of the build. A set that
# this CPU lacks is reported as skipped. Those that run no CPU kernel are listed here and left out;
# that they run none is checked by a run which forces a set that no build for this processor has.
set(without_kernels
  config_test cuda_formats_test cuda_plugin_test encode_test error_test gguf_damage_test gguf_hazards_test
  gguf_moe_tensors_test gguf_shards_test gguf_sharing_test gguf_size_test gguf_test
  metal_dispatch_test names_test plan_test profile_test quant_test route_test
  thread_pool_test tile_kernels_test tile_machine_test
  tuning_test types_test workspace_test)
foreach(name IN LISTS without_kernels)
  if(NOT TARGET ${name})
    message(FATAL_ERROR "tests/per_isa.cmake lists ${name}, which is no program of tests/cpp")
  endif()
endforeach()

add_executable(isa_probe ${CMAKE_CURRENT_SOURCE_DIR}/cpp/isa_probe.cpp)
target_link_libraries(isa_probe PRIVATE moesaic)
target_include_directories(isa_probe PRIVATE ${PROJECT_SOURCE_DIR}/cpp/src)
target_compile_options(isa_probe PRIVATE ${moesaic_warnings})

get_target_property(isas moesaic MOESAIC_ISAS)
if("neon" IN_LIST isas)
  set(foreign_isa avx2)
else()
  set(foreign_isa neon)
endif()
foreach(source IN LISTS test_sources)
  get_filename_component(name ${source} NAME_WE)
  if(name IN_LIST without_kernels)
    add_test(NAME per_isa.none.${name} COMMAND ${name})
    set_tests_properties(per_isa.none.${name} PROPERTIES LABELS per_isa
      ENVIRONMENT MOESAIC_CPU_ISA=${foreign_isa})
    continue()
  endif()
  foreach(isa IN ITEMS scalar LISTS isas)
    add_test(NAME per_isa.${isa}.${name}
      COMMAND ${CMAKE_COMMAND} -DISA=${isa} -DPROBE=$<TARGET_FILE:isa_probe> -DPROGRAM=$<TARGET_FILE:${name}>
              -P ${CMAKE_CURRENT_SOURCE_DIR}/run_per_isa.cmake)
    set_tests_properties(per_isa.${isa}.${name} PROPERTIES LABELS per_isa
      SKIP_REGULAR_EXPRESSION "this CPU cannot run")
  endforeach()
endforeach()
