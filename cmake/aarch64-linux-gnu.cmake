# Cross-building for 64-bit ARM with Debian's compiler, and running what was built under emulation:
#
#     apt-get install --no-install-recommends g++-aarch64-linux-gnu qemu-user-static
#     cmake -S . -B build/arm -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake -DTINYCHAT_NATIVE_TESTS=ON
#
# TINYCHAT_EMULATED_CPU is the model that qemu shows (cortex-a72: no dot product; cortex-a76: dot product; max: i8mm too).
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(TINYCHAT_EMULATED_CPU max CACHE STRING "CPU model for qemu-aarch64-static")
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64-static -cpu ${TINYCHAT_EMULATED_CPU} -L /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
