//! Which of several ways a step takes.

/// Choices between launches that compute the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// The MLP's router chain runs beside QKV and attention; else in line with them.
    pub beside: bool,
    /// The down product of up to [`MADE_ROWS`](super::launch::MADE_ROWS) rows makes its own input.
    pub made: bool,
    /// Decode attention may run in blocks of eight warps, see [`Kernels::line`](super::launch::Kernels::line).
    pub large: bool,
    /// Products of few rows do their activation too, see [`Kernels::product_activated`](super::launch::Kernels::product_activated).
    pub activated: bool,
    /// Decode attention takes the MLP router's scores along, see [`Kernels::takes_scores`](super::launch::Kernels::takes_scores).
    pub along: bool,
    /// And chooses the neurons, see [`Kernels::chooses`](super::launch::Kernels::chooses).
    pub choose: bool,
    /// Its workers may be clusters of blocks, see [`Kernels::line`](super::launch::Kernels::line).
    pub clusters: bool,
    /// The products around attention leave out heads that nobody keeps, see [`super::heads`].
    pub heads: bool,
}

impl Default for Tuning {
    fn default() -> Tuning {
        Tuning {
            beside: true,
            made: true,
            large: true,
            activated: true,
            along: true,
            choose: true,
            clusters: true,
            heads: true,
        }
    }
}
