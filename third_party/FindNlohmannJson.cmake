# Finds the headers of nlohmann/json: those of the pip package nlohmann-json in the building Python, else the system's.
# Defines NlohmannJson::NlohmannJson. Set NlohmannJson_INCLUDE_DIR to choose another copy.

if(NOT NlohmannJson_INCLUDE_DIR)
  set(hints ${CMAKE_PREFIX_PATH})
  list(TRANSFORM hints APPEND /nlohmann_json/include)  # scikit-build-core lists its site-packages there

  set(python ${Python_EXECUTABLE})
  if(NOT python)
    find_program(NlohmannJson_PYTHON NAMES python3 python)
    mark_as_advanced(NlohmannJson_PYTHON)
    set(python ${NlohmannJson_PYTHON})
  endif()
  if(python)
    execute_process(
      COMMAND ${python} -c "import importlib.util as u; print(*u.find_spec('nlohmann_json').submodule_search_locations)"
      OUTPUT_VARIABLE package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    list(APPEND hints ${package}/include)
  endif()
endif()

find_path(NlohmannJson_INCLUDE_DIR nlohmann/json.hpp HINTS ${hints})
mark_as_advanced(NlohmannJson_INCLUDE_DIR)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(NlohmannJson REQUIRED_VARS NlohmannJson_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "run `pip install nlohmann-json` in the Python on PATH, or `apt-get install nlohmann-json3-dev`")

if(NlohmannJson_FOUND AND NOT TARGET NlohmannJson::NlohmannJson)
  add_library(NlohmannJson::NlohmannJson INTERFACE IMPORTED)
  set_target_properties(NlohmannJson::NlohmannJson PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES ${NlohmannJson_INCLUDE_DIR})
endif()
