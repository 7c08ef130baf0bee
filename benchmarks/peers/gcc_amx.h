// Included before every file of llama.cpp where GCC compiles it. Up to version 12 at least, GCC's own _tile_loadconfig
// tells the compiler that 8 of the 64 bytes are read: it leaves out the stores of the tiles' shapes, all tiles are
// empty, and the first use of one is an illegal instruction.
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(config)))
#endif
