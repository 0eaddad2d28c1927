# Language level, visibility, warnings and sanitizers of every target; included once, from the top.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release)
endif()

set(compiler "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
if((CMAKE_CXX_COMPILER_ID STREQUAL GNU AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 11) OR
   (CMAKE_CXX_COMPILER_ID STREQUAL Clang AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 14))
  message(FATAL_ERROR "moesaic needs a C++20 compiler: found ${compiler} (${CMAKE_CXX_COMPILER}), "
    "needed g++ >= 11 or clang >= 14. Name another one with -DCMAKE_CXX_COMPILER=... or CXX=...")
elseif(NOT CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  message(FATAL_ERROR "moesaic is built with g++ or clang: found ${compiler} (${CMAKE_CXX_COMPILER}). "
    "Name another one with -DCMAKE_CXX_COMPILER=... or CXX=...")
endif()

if(PROJECT_IS_TOP_LEVEL AND NOT DEFINED CMAKE_CXX_COMPILER_LAUNCHER)
  find_program(MOESAIC_CCACHE ccache)
  if(MOESAIC_CCACHE)
    set(CMAKE_CXX_COMPILER_LAUNCHER ${MOESAIC_CCACHE})
  endif()
endif()

set(moesaic_warnings -Wall -Wextra)
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  list(APPEND moesaic_warnings -Wno-restrict)  # false alarms on std::string, GCC bug 105651
endif()
if(MOESAIC_WERROR)
  list(APPEND moesaic_warnings -Werror)
endif()

# Files are untrusted input: should a check of the readers be missing, an overrun ends the process
# and finds no table to overwrite. Sanitizers bring checks of their own.
set(moesaic_hardening "")
set(moesaic_hardened_link "")
if(CMAKE_SYSTEM_NAME STREQUAL "Linux" AND NOT MOESAIC_SANITIZE)
  set(moesaic_hardening -fstack-protector-strong
    "$<$<NOT:$<CONFIG:Debug>>:-U_FORTIFY_SOURCE;-D_FORTIFY_SOURCE=2>")
  set(moesaic_hardened_link LINKER:-z,relro,-z,now,-z,noexecstack)
endif()

if(MOESAIC_SANITIZE)
  # A report must fail the test that caused it.
  add_compile_options(-fsanitize=${MOESAIC_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  add_link_options(-fsanitize=${MOESAIC_SANITIZE})
endif()
