// Stands in for macOS's header where test_macos.cpp compiles csrc/isa.cpp as for a Mac; the test answers the calls.
#pragma once
#include <cstddef>

#define sysctlbyname pretended_sysctlbyname

int sysctlbyname(const char* name, void* value, size_t* size, void* new_value, size_t new_size);
