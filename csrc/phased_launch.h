// The host's side of every kernel with phases: how the grid shares the work, the workspaces, and the launch.
#pragma once

#include "dispatch.h"
#include "grid.h"

namespace interp_nn {

// The rows of a feature tile are split into so many parts, enough to occupy the device and each with some rows to do.
// There are as many programs as the phase with the most jobs can use.
struct Plan {
    int splits, programs;
};
inline Plan plan_grid(const DeviceSpec& device, int64_t n, int64_t d, int depth, int64_t row_jobs, bool backprop,
                      bool need_b) {
    const int64_t feature_tiles = divide_up(d, depth), room = device.multiprocessors / feature_tiles;
    const int64_t rows = divide_up(n, 256);
    int64_t splits = room < rows ? room : rows;
    if (splits < 1) splits = 1;
    int64_t jobs = row_jobs;
    if (backprop && jobs < feature_tiles * splits) jobs = feature_tiles * splits;
    if (need_b && jobs < divide_up(d, SLICE)) jobs = divide_up(d, SLICE);
    return {static_cast<int>(splits), programs_for(device, jobs)};
}

// The row length of a workspace with k columns: whole 16-byte words of 16-bit numbers.
HOST_DEVICE int width_of(int k) { return (k + 7) / 8 * 8; }

// D, the gradient of the projection, is needed for dX and for db.
HOST_DEVICE bool need_d(const Gradients& arguments) { return arguments.dx != nullptr || arguments.db != nullptr; }

// A workspace that is handed out array by array. The host, which has no memory yet, uses only the size that they add up
// to.
template <class T> struct Area {
    T* memory;
    int64_t size = 0;

    HOST_DEVICE explicit Area(void* memory) : memory(static_cast<T*>(memory)) {}
    HOST_DEVICE T* take(int64_t count) {
        T* const array = memory + size;
        size += count;
        return array;
    }
};

// The calls of an instance of a kernel, which has: Work(arguments, splits, programs) with areas `floats` and `rows`,
// Tiles::shared, plan(arguments, device) and kernel().
template <class Instance, class Arguments> struct PhasedLaunch {
    static Workspace call(const Arguments& arguments, const DeviceSpec& device) {
        const Plan plan = Instance::plan(arguments, device);
        const typename Instance::Work work(arguments, plan.splits, plan.programs);
        return {work.floats.size, work.rows.size};
    }
    static const char* call(const Arguments& arguments, const DeviceSpec& device, Stream stream) {
        using Tiles = typename Instance::Tiles;
        const int stages = stages_for(device, Tiles::shared);
        if (stages == 0) return NO_KERNEL;
        const Plan plan = Instance::plan(arguments, device);
        return start(Instance::kernel(), plan.programs, Tiles::shared(stages), true, stream, arguments,
                     mode_of(arguments.kind), plan.splits, stages);
    }
};

}  // namespace interp_nn
