// What the MLP router's second product leaves: scores of the neurons, straight from a block's sums. One part, so that
// every logit is whole there.
#pragma once
#include "common.cuh"

// Sums over the rows of group 0 of max(logit, 0), and each other row's own; NaN stays NaN. Lane 4 g + t has neurons
// neuron0 + 16 m + g (+ 8 for i > 1) of rows 8 n + 2 t + i % 2 in `c`.
template <int MT, int NT> DEVICE void store_scores(const RouterParams& p, uint32_t neuron0, const float (&c)[MT][NT][4]) {
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    uint32_t group[NT][2];
    UNROLL for (int n = 0; n < NT; n++) {
        UNROLL for (int i = 0; i < 2; i++) {
            const uint32_t r = 8 * n + 2 * t + i;
            group[n][i] = r < p.rows ? p.group[r] : NONE;
        }
    }
    UNROLL for (int m = 0; m < MT; m++) {
        UNROLL for (int high = 0; high < 2; high++) {
            const uint32_t neuron = neuron0 + 16 * m + g + 8 * high;
            float shared_score = p.more && p.first_group == 0 && t == 0 && neuron < p.n ? p.scores[neuron] : 0.0f;
            UNROLL for (int n = 0; n < NT; n++) {
                UNROLL for (int i = 0; i < 2; i++) {
                    const float logit = c[m][n][2 * high + i], score = logit < 0 ? 0.0f : logit;
                    if (group[n][i] == 0) shared_score += score;
                    else if (group[n][i] != NONE && neuron < p.n)
                        p.scores[(uint64_t)(group[n][i] - p.first_group) * p.n + neuron] = score;
                }
            }
            shared_score += shuffle_xor(shared_score, 1);
            shared_score += shuffle_xor(shared_score, 2);
            if (t == 0 && neuron < p.n && p.first_group == 0) p.scores[neuron] = shared_score;
        }
    }
}
