//! Every limit on what a file may ask of us, in one place. All are checked before memory of the
//! size in question is allocated.

/// Bytes read at once when a whole tensor is looked at.
pub const PIECE_BYTES: usize = 4 << 20;

/// Limits on files. [`Limits::default`] is far above any published model and far below what would
/// hurt a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all tensor files of a model, or of a router file.
    pub max_file_bytes: u64,
    /// Bytes of a safetensors header.
    pub max_header_bytes: u64,
    /// Tensors, over all files of a model.
    pub max_tensors: usize,
    /// Bytes of a tensor's name.
    pub max_name_bytes: usize,
    /// Any dimension of a tensor.
    pub max_dim: u64,
    /// Entries of a file's `__metadata__`.
    pub max_metadata_entries: usize,
    /// Bytes of all its keys and values.
    pub max_metadata_bytes: usize,
    /// Files of a sharded model.
    pub max_shards: usize,
    /// Bytes of `config.json` and `generation_config.json`.
    pub max_config_bytes: u64,
    /// Bytes of `model.safetensors.index.json`.
    pub max_index_bytes: u64,
    /// Bytes of `tokenizer.json`.
    pub max_tokenizer_bytes: u64,
    /// Brackets open at once in any JSON.
    pub max_json_depth: usize,
    /// Rows of the embedding.
    pub max_vocab: u32,
    /// Decoder layers.
    pub max_layers: u32,
    /// Width of the residual stream, and of all heads together.
    pub max_hidden: u32,
    /// Query heads.
    pub max_heads: u32,
    /// Dimensions of a head.
    pub max_head_dim: u32,
    /// MLP neurons.
    pub max_ffn: u32,
    /// Positions.
    pub max_positions: u32,
    /// End-of-sequence tokens.
    pub max_eos_tokens: usize,
    /// Rank of an MLP router.
    pub max_router_rank: u32,
    /// Batch sizes of a router file's `K_l(B)` table.
    pub max_router_batches: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_file_bytes: 4 << 40,
            max_header_bytes: 16 << 20,
            max_tensors: 65_536,
            max_name_bytes: 256,
            max_dim: 1 << 31,
            max_metadata_entries: 4096,
            max_metadata_bytes: 8 << 20,
            max_shards: 512,
            max_config_bytes: 1 << 20,
            max_index_bytes: 16 << 20,
            max_tokenizer_bytes: 64 << 20,
            max_json_depth: 64,
            max_vocab: 1 << 24,
            max_layers: 1024,
            max_hidden: 1 << 18,
            max_heads: 4096,
            max_head_dim: 1024,
            max_ffn: 1 << 22,
            max_positions: 1 << 26,
            max_eos_tokens: 1024,
            max_router_rank: 1 << 16,
            max_router_batches: 1024,
        }
    }
}
