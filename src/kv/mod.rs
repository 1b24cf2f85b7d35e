//! KV pages: which page holds which tokens of which sequence. Arithmetic on page numbers; the
//! backend owns the bytes.

mod pool;
mod table;

pub use pool::PagePool;
pub use table::BlockTable;

/// Tokens in one page.
pub const PAGE_TOKENS: usize = 16;

/// Pages that hold `tokens` tokens.
pub fn pages_for(tokens: usize) -> usize {
    tokens.div_ceil(PAGE_TOKENS)
}
