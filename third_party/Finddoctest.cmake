# Finds the system's doctest header. Defines doctest::doctest. Set doctest_INCLUDE_DIR to choose another copy.

find_path(doctest_INCLUDE_DIR doctest/doctest.h)
mark_as_advanced(doctest_INCLUDE_DIR)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(doctest REQUIRED_VARS doctest_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "run `apt-get install doctest-dev` (`dnf install doctest-devel`), or turn KT_MOE_TESTS off")

if(doctest_FOUND AND NOT TARGET doctest::doctest)
  add_library(doctest::doctest INTERFACE IMPORTED)
  set_target_properties(doctest::doctest PROPERTIES INTERFACE_INCLUDE_DIRECTORIES ${doctest_INCLUDE_DIR})
endif()
