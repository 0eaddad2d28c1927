# Label build: facts about the object files that no program can see at run time.
find_package(Python3 QUIET COMPONENTS Interpreter)
if(NOT Python3_FOUND OR NOT CMAKE_OBJDUMP OR NOT CMAKE_NM OR APPLE)
  message(STATUS "moesaic: tests/build left out (they need python3, objdump and nm)")
  return()
endif()
file(GENERATE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/objects.txt CONTENT "$<JOIN:$<TARGET_OBJECTS:moesaic>,\n>\n")
get_target_property(isas moesaic MOESAIC_ISAS)
list(JOIN isas "," isas)
foreach(check IN ITEMS baseline isolation lifetime)
  add_test(NAME build.${check}
    COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/build/check_objects.py ${check}
            --objects ${CMAKE_CURRENT_BINARY_DIR}/objects.txt --isas "${isas}"
            --objdump ${CMAKE_OBJDUMP} --nm ${CMAKE_NM})
  set_tests_properties(build.${check} PROPERTIES LABELS build)
endforeach()
