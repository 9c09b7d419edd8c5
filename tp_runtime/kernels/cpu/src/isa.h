// Which instruction set the kernels use: the best this CPU and its operating system offer, or a lower
// one that was asked for. AMX tiles need the kernel's permission, asked for once a process.
#pragma once

namespace tp {

enum class Isa { kNone = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

// Highest level usable here: kAvx2 needs AVX2, FMA and F16C; kAvx512 needs F, BW, VL, DQ, VNNI and BF16;
// kAmx needs the tiles with bf16 on top, and the permission to use them.
Isa detect_isa();

// The level the kernels use: detect_isa() unless limit_isa() lowered it. The clones of step.cpp's small loops
// are chosen by the loader, which knows of no limit: they give the same bits at every level (sums in 16 fixed
// lanes, no contraction to FMA), so a limit changes nothing there.
Isa active_isa();
void limit_isa(Isa highest);

}  // namespace tp
