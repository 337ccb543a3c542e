# The imported target `torch_wheel`: headers and libraries of the torch that Python imports.
# Not find_package(Torch), since that of a CUDA wheel insists on a CUDA toolkit, which nothing here needs.
find_package(Python3 REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND ${Python3_EXECUTABLE} -c
    "from importlib.util import find_spec; print(*find_spec('torch').submodule_search_locations, end='')"
  OUTPUT_VARIABLE torch_root RESULT_VARIABLE status ERROR_QUIET)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "${Python3_EXECUTABLE} has no torch: choose another with -DPython3_EXECUTABLE=..., "
    "or build without the library, -DGALORE_RRF_LIBRARY=OFF")
endif()

add_library(torch_wheel INTERFACE IMPORTED)
target_include_directories(torch_wheel SYSTEM INTERFACE
  ${torch_root}/include ${torch_root}/include/torch/csrc/api/include)
target_link_libraries(torch_wheel INTERFACE
  ${torch_root}/lib/libtorch_cpu.so ${torch_root}/lib/libc10.so)
