# cmake -DISA=avx2 -DPROBE=... -DPROGRAM=... -P run_per_isa.cmake
execute_process(COMMAND ${PROBE} OUTPUT_VARIABLE supported COMMAND_ERROR_IS_FATAL ANY)
string(REPLACE "\n" ";" supported "${supported}")
if(NOT ISA IN_LIST supported)
  message("skipped: this CPU cannot run ${ISA}")
  return()
endif()
set(ENV{MOESAIC_CPU_ISA} ${ISA})
execute_process(COMMAND ${PROGRAM} COMMAND_ERROR_IS_FATAL ANY)
