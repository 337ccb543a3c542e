# Adds csrc/cuda to the library, with what cmake/find_cuda.py finds.
execute_process(
  COMMAND ${CMAKE_COMMAND} -E env GALORE_RRF_CUDA=${GALORE_RRF_CUDA}
    ${Python3_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/find_cuda.py
  OUTPUT_VARIABLE found ERROR_VARIABLE sentence RESULT_VARIABLE status)
string(STRIP "${sentence}" sentence)
if(NOT status EQUAL 0)
  message(FATAL_ERROR "${sentence}")
endif()
message(STATUS "${sentence}")
cmake_language(EVAL CODE "${found}")

if(cuda_home)
  set(CMAKE_CUDA_COMPILER ${cuda_home}/bin/nvcc)
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  enable_language(CUDA)
  file(STRINGS csrc/cuda/sources.txt sources)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS csrc/cuda/sources.txt)
  target_sources(galore_rrf PRIVATE ${sources})
  target_compile_definitions(galore_rrf PRIVATE GALORE_RRF_WITH_CUDA)
  target_compile_options(galore_rrf PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${cuda_flags}>")
  target_include_directories(galore_rrf SYSTEM PRIVATE ${cuda_include_dirs})
  target_link_libraries(galore_rrf PRIVATE ${cuda_libraries})
  # Architectures, visibility and the runtime are among the flags and libraries.
  set_target_properties(galore_rrf PROPERTIES CUDA_ARCHITECTURES OFF CUDA_RUNTIME_LIBRARY None)
  foreach(library IN LISTS cuda_libraries)
    cmake_path(GET library PARENT_PATH folder)
    set_property(TARGET galore_rrf APPEND PROPERTY INSTALL_RPATH ${folder})
  endforeach()
endif()
