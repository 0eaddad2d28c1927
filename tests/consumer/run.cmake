file(REMOVE_RECURSE ${WORK_DIR})
foreach(step IN ITEMS install configure build run)
  if(step STREQUAL install)
    set(command ${CMAKE_COMMAND} --install ${BUILD_DIR} --config ${CONFIG} --prefix ${WORK_DIR}/prefix
        --component development)
  elseif(step STREQUAL configure)
    set(command ${CMAKE_COMMAND} -S ${SOURCE_DIR} -B ${WORK_DIR}/build -G ${GENERATOR}
        -DCMAKE_MAKE_PROGRAM=${MAKE_PROGRAM} -DCMAKE_CXX_COMPILER=${CXX} -DCMAKE_BUILD_TYPE=Release
        -DCMAKE_PREFIX_PATH=${WORK_DIR}/prefix)
  elseif(step STREQUAL build)
    set(command ${CMAKE_COMMAND} --build ${WORK_DIR}/build)
  else()
    set(command ${WORK_DIR}/build/consumer)
  endif()
  message("consumer: ${step}")
  execute_process(COMMAND ${command} COMMAND_ERROR_IS_FATAL ANY)
endforeach()

# Without CMake, by pkg-config, from a tree that was moved.
find_program(pkg_config pkg-config)
if(NOT pkg_config)
  message("consumer: no pkg-config here")
  return()
endif()
message("consumer: pkg-config")
file(RENAME ${WORK_DIR}/prefix ${WORK_DIR}/moved)
file(GLOB_RECURSE found ${WORK_DIR}/moved/*/moesaic.pc)
cmake_path(GET found PARENT_PATH folder)
set(ENV{PKG_CONFIG_PATH} ${folder})
execute_process(COMMAND ${pkg_config} --cflags --libs moesaic COMMAND_ERROR_IS_FATAL ANY
  OUTPUT_VARIABLE flags OUTPUT_STRIP_TRAILING_WHITESPACE)
separate_arguments(flags UNIX_COMMAND "${flags}")
execute_process(COMMAND ${CXX} ${SOURCE_DIR}/main.cpp -o ${WORK_DIR}/by_pkg_config ${flags}
  COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${WORK_DIR}/by_pkg_config COMMAND_ERROR_IS_FATAL ANY)
