// The three-term loss of two logits a class, w1 CE(o1, t) + w2 CE(o2, t) + w3 MSE(o1, o2), for both of its kernels.
//
// Gradients are kept without the factor upstream / kept rows, which would make 16-bit ones underflow. They are
// multiplied with it in fp32 when they are stored. Reduction::NONE has one upstream a row, which is applied at once.
#pragma once

#include "feature_tiles.h"

namespace interp_nn {

// A lane has columns of two rows, g and g + 8 of its warp's sixteen. These reduce over the four lanes of a row.
DEVICE float row_sum(float value) {
    value += shuffle(value, lane() ^ 1);
    return value + shuffle(value, lane() ^ 2);
}
DEVICE float row_maximum(float value) {
    value = fmaxf(value, shuffle(value, lane() ^ 1));
    return fmaxf(value, shuffle(value, lane() ^ 2));
}

// Call visit(column, element, element) for a lane's elements of the first of its two rows, in two matrices.
template <int TILES, class Visit>
DEVICE void each_of_row(float (&first)[TILES][4], float (&second)[TILES][4], Visit visit) {
    UNROLL for (int i = 0; i < TILES; ++i) {
        UNROLL for (int j = 0; j < 2; ++j) visit(8 * i + lane() % 4 * 2 + j, first[i][j], second[i][j]);
    }
}

// Exchange a lane's two rows, so that the same code serves both.
template <int TILES> DEVICE void exchange_rows(float (&sums)[TILES][4]) {
    UNROLL for (int i = 0; i < TILES; ++i) {
        UNROLL for (int j = 0; j < 2; ++j) {
            const float other = sums[i][j];
            sums[i][j] = sums[i][j + 2];
            sums[i][j + 2] = other;
        }
    }
}

// The sums of a program: each lane of a row has a quarter.
struct LossSums {
    float loss = 0.f, count = 0.f;
};

// Add a warp's rows to the sums, store their losses for Reduction::NONE, and replace the logits by their gradients,
// zero where a row does not count. Logits beyond the columns are zero.
template <int TILES>
DEVICE void loss_terms(const LossTerms& terms, float (&o1)[TILES][4], float (&o2)[TILES][4], int64_t first_row, int64_t n,
                       int columns, LossSums& sums) {
    NO_UNROLL for (int half = 0; half < 2; ++half) {
        const int64_t row = first_row + lane() / 4 + 8 * half;
        const int64_t given = row < n ? terms.target[row] : terms.ignore_index;
        const bool kept = given != terms.ignore_index;
        demand(!kept || (given >= 0 && given < columns), "target: class index out of range");
        const int target = kept ? static_cast<int>(given) : -1;

        float squares = 0.f, most1 = -INFINITY, most2 = -INFINITY, hit1 = 0.f, hit2 = 0.f;
        each_of_row(o1, o2, [&](int c, float& v1, float& v2) {
            squares += (v1 - v2) * (v1 - v2);
            if (c == target) hit1 = v1, hit2 = v2;
            if (c >= columns) v1 = v2 = -INFINITY;
            most1 = fmaxf(most1, v1), most2 = fmaxf(most2, v2);
        });
        most1 = row_maximum(most1), most2 = row_maximum(most2);
        float total1 = 0.f, total2 = 0.f;
        each_of_row(o1, o2, [&](int, float v1, float v2) {
            total1 += exponential(v1 - most1), total2 += exponential(v2 - most2);
        });
        total1 = row_sum(total1), total2 = row_sum(total2);
        const float each = 1.f / static_cast<float>(columns);
        const float entropy1 = logf(total1) + most1 - row_sum(hit1), entropy2 = logf(total2) + most2 - row_sum(hit2);
        const float loss = terms.w1 * entropy1 + terms.w2 * entropy2 + terms.w3 * (row_sum(squares) * each);
        float weight = 1.f;
        if (terms.reduction == Reduction::NONE) {
            if (kept && terms.upstream != nullptr) weight = terms.upstream[row];
            if (row < n && lane() % 4 == 0) terms.value[row] = kept ? loss : 0.f;
        }
        sums.loss += kept ? .25f * loss : 0.f;
        sums.count += kept ? .25f : 0.f;

        const float inverse1 = 1.f / total1, inverse2 = 1.f / total2;
        const float scale1 = terms.w1 * weight, scale2 = terms.w2 * weight, mse_grad = 2.f * terms.w3 * each * weight;
        const int inside = kept ? columns : 0;
        each_of_row(o1, o2, [&](int c, float& v1, float& v2) {
            const float towards = (v1 - v2) * mse_grad, one = c == target ? 1.f : 0.f;
            const float e1 = (exponential(v1 - most1) * inverse1 - one) * scale1 + towards;
            const float e2 = (exponential(v2 - most2) * inverse2 - one) * scale2 - towards;
            v1 = c < inside ? e1 : 0.f, v2 = c < inside ? e2 : 0.f;
        });
        exchange_rows(o1);
        exchange_rows(o2);
    }
}

// Store a program's parts of loss and count; `memory` is free shared memory.
DEVICE void store_loss_sums(const LossSums& sums, float* losses, float* counts, unsigned char* memory) {
    auto* const parts = reinterpret_cast<float*>(memory);
    const float loss = warp_sum(sums.loss), count = warp_sum(sums.count);
    if (lane() == 0) {
        parts[warp()] = loss;
        parts[WARPS + warp()] = count;
    }
    block_barrier();
    if (thread() < 2) {
        float total = 0.f;
        for (int w = 0; w < WARPS; ++w) total += parts[thread() * WARPS + w];
        (thread() == 0 ? losses : counts)[program()] = total;
    }
    block_barrier();
}

// The factor that the gradients lack: upstream / kept rows for the mean, upstream for the sum, 1 without a reduction.
DEVICE float gradient_scale(const LossTerms& terms, const float* counts) {
    if (terms.reduction == Reduction::NONE) return 1.f;
    const float upstream = terms.upstream == nullptr ? 1.f : *terms.upstream;
    return terms.reduction == Reduction::SUM ? upstream : upstream / fmaxf(add_scalars(counts, programs()), 1.f);
}

// Store the mean over kept rows (NaN without any, as in PyTorch) or the sum, by one warp.
DEVICE void store_value(const LossTerms& terms, const float* losses, const float* counts) {
    if (terms.reduction == Reduction::NONE || warp() != 0) return;
    const float total = add_scalars(losses, programs()), count = add_scalars(counts, programs());
    if (lane() == 0) *terms.value = terms.reduction == Reduction::MEAN ? total / count : total;
}

}  // namespace interp_nn
