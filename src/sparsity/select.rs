//! What a selection means, independent of any device: the CPU backend calls these, other backends
//! are tested against them.
//!
//! Ties go to the lower index; NaN sorts last and is counted. Lists are ascending.
