// How a quantized weight [N, K] lies on the device: one layout for one row and for two thousand.
//
// A tensor-core product takes the weights as its left side (A [16 outputs, 16 inputs]) and activations as its right
// (B [16 inputs, 8 rows]), so that codes go from memory to registers without a detour, each 16-byte load of a lane being
// its share of four products. With g = lane / 4 and t = lane % 4, lane and register decide output and input of a weight:
//
//   tile   16 outputs: "upper" g, "lower" g + 8              N is padded to tiles, K to chunks, with zeros
//   chunk  64 inputs, 4 steps of 16: half 0 has steps 0, 1 and inputs 0 .. 31, half 1 steps 2, 3 and inputs 32 .. 63
//
//   input of (half, t, step of the half s, register half h, element e) = 32 half + 8 t + 4 s + 2 h + e
//
//        t = 0            t = 1            t = 2            t = 3
//   | s0   | s1   | | s0   | s1   | | s0   | s1   | | s0   | s1   |      h0 h1 = two pairs of a step: A's columns
//   | h0 h1| h0 h1| | h0 h1| h0 h1| ...                                  2t, 2t+1 and 2t+8, 2t+9
//
// so a lane's activations of a half are 8 neighbours: one 16-byte load too.
//
// codes  [tile][chunk][lane][step] words of 32 bits: 8 codes of 4 bits, in the order 0, 2, 4, 6, 1, 3, 5, 7 of
//        (h, upper | lower, e) = e0 e1 of upper h0, of lower h0, of upper h1, of lower h1:
//
//          bits    31-28    27-24    23-20    19-16    15-12    11-8     7-4      3-0
//          code    e1 lower e1 upper e1 lower e1 upper e0 lower e0 upper e0 lower e0 upper
//                  h1       h1       h0       h0       h1       h1       h0       h0
//
//        so that one `and` with 0x000f000f leaves a pair for a register, with 0x00f000f0 the next, times 16.
//        8 bits: [tile][chunk][half][lane][step of the half][h] words, of bytes upper e0, e1, lower e0, e1.
//        2 and 3 bits lie as 4. A chunk of a tile is 512 or 1024 bytes without a gap.
// scales [tile][group][g] pairs (upper, lower) of fp16, or of fp32 for scales that were not fp16: one load of a lane
// zeros  [tile][group][g] pairs of bytes: likewise
//
// A group here is a power of two of inputs, 32 or more, or the whole row; for others see the packer
// (tinychat/backends/cuda_linear.py), which makes three groups of 32 out of one of 96.
#pragma once
#include <cstdint>

#include "stream.h"

namespace tinychat::cuda {

constexpr int kTileOutputs = 16;
constexpr int kChunk = 64;

struct PackedWeight {
    const void* codes;
    const void* scales;
    const uint8_t* zeros;
    int n, k;
    int chunks;       // of a tile: K / 64, rounded up
    int groups;       // of a tile
    int group_shift;  // half-chunk i of a row (32 inputs) is in group i >> group_shift
    int bits;         // 4 or 8, as they lie
    bool wide;        // scales are fp32
};

// y = x W^T + bias: x [rows, k] of 16 bits, y of the same type or fp32.
struct LinearCall {
    PackedWeight weight;
    const void* x;      // aligned to 16 bytes
    const float* bias;  // [n], or null
    void* y;
    int rows;
    int x_stride;       // numbers from one row of x to the next: k up to a multiple of 8, with zeros beyond k
    int y_stride;       // of y, n or more
    Dtype dtype;        // of x
    bool wide_output;   // y is fp32
};

}  // namespace tinychat::cuda
