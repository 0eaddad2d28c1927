# Label per_isa: every program that runs CPU kernels, once for each instruction set of the build.
# A set that this CPU lacks is reported as skipped.

set(per_isa_programs "")
foreach(source IN LISTS test_sources)
  get_filename_component(name ${source} NAME_WE)
  if(name MATCHES "^(forward|layer|contract|cpu|gemv|gemm|kernel|stack|expert)")
    list(APPEND per_isa_programs ${name})
  endif()
endforeach()
if(NOT per_isa_programs)
  return()
endif()

add_executable(isa_probe ${CMAKE_CURRENT_SOURCE_DIR}/cpp/isa_probe.cpp)
target_link_libraries(isa_probe PRIVATE moesaic)
target_include_directories(isa_probe PRIVATE ${PROJECT_SOURCE_DIR}/cpp/src)
target_compile_options(isa_probe PRIVATE ${moesaic_warnings})

get_target_property(isas moesaic MOESAIC_ISAS)
foreach(isa IN ITEMS scalar LISTS isas)
  foreach(name IN LISTS per_isa_programs)
    add_test(NAME per_isa.${isa}.${name}
      COMMAND ${CMAKE_COMMAND} -DISA=${isa} -DPROBE=$<TARGET_FILE:isa_probe> -DPROGRAM=$<TARGET_FILE:${name}>
              -P ${CMAKE_CURRENT_SOURCE_DIR}/run_per_isa.cmake)
    set_tests_properties(per_isa.${isa}.${name} PROPERTIES LABELS per_isa
      SKIP_REGULAR_EXPRESSION "this CPU cannot run")
  endforeach()
endforeach()
