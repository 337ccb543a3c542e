# The imported target `torch_wheel`: headers and libraries of the torch that Python imports.
# Not find_package(Torch), since that of a CUDA wheel insists on a CUDA toolkit, which nothing here needs.
find_package(Python3 QUIET COMPONENTS Interpreter)
execute_process(
  COMMAND ${Python3_EXECUTABLE} -c
    "from importlib.util import find_spec; print(*find_spec('torch').submodule_search_locations, end='')"
  OUTPUT_VARIABLE TorchWheel_ROOT RESULT_VARIABLE status ERROR_QUIET)
if(status EQUAL 0)
  file(STRINGS ${TorchWheel_ROOT}/version.py TorchWheel_VERSION REGEX "^__version__ = ")
  string(REGEX MATCH "[0-9]+\\.[0-9]+" TorchWheel_VERSION "${TorchWheel_VERSION}")
else()
  set(TorchWheel_ROOT)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TorchWheel
  REQUIRED_VARS TorchWheel_ROOT VERSION_VAR TorchWheel_VERSION
  REASON_FAILURE_MESSAGE
    "it looked for the torch of ${Python3_EXECUTABLE}, choose another Python with -DPython3_EXECUTABLE=...")

if(TorchWheel_FOUND AND NOT TARGET torch_wheel)
  add_library(torch_wheel INTERFACE IMPORTED)
  target_include_directories(torch_wheel SYSTEM INTERFACE
    ${TorchWheel_ROOT}/include ${TorchWheel_ROOT}/include/torch/csrc/api/include)
  target_link_libraries(torch_wheel INTERFACE
    ${TorchWheel_ROOT}/lib/libtorch_cpu.so ${TorchWheel_ROOT}/lib/libc10.so)
endif()
