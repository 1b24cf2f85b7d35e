//! Kernels whose threads race: the cases of the other files with the race detector (`cuda/host/races.h`),
//! and faults that it must find. `POLAR_TEST_RACES=1` runs every case of this program with it.

use crate::bench::with_races;
use crate::host_device::{self, Library, root};
use crate::{
    activated, attention, heads, linear, linear_bytes, ops, ops_mlp, prefill, router, rows, sampling,
    selection,
};
use polar_sparsity::backend::cuda::launch::{Id, Launch, NAMES};
use polar_sparsity::backend::cuda::params::Ptr;

/// Cases that are quick, and together run every kernel.
const CASES: &[fn()] = &[
    rows::embedding_with_and_without_positions,
    rows::norms_add_the_pending_sum_first,
    rows::qkv_bias_norm_rotation_and_pages,
    rows::qkv_selects_heads_beside_its_work,
    rows::activations_lists_and_masks,
    rows::argmax_ties_nan_and_log_probability,
    rows::transposition_and_conversion,
    attention::decode_every_head_size_and_type,
    attention::decode_every_group,
    attention::decode_window,
    attention::decode_ragged_long_among_ones,
    attention::decode_lengths_workers_and_orders,
    attention::decode_in_large_blocks,
    attention::decode_in_clusters,
    prefill::prefill_every_head_size_and_type,
    linear::skinny_products_at_every_tile_edge,
    linear::skinny_products_of_listed_rows,
    linear::down_products_of_every_number_of_rows,
    linear::down_products_of_chunks,
    linear::down_products_that_make_their_input,
    router::router_products_leave_scores,
    router::rows_become_bytes,
    attention::decode_takes_scores_along,
    attention::decode_chooses_among_any_scores,
    activated::products_with_an_activation_at_every_edge,
    activated::products_of_listed_rows_with_an_activation,
    activated::products_of_more_rows_with_an_activation,
    heads::one_sequences_heads_are_chosen_in_the_product,
    heads::the_output_projection_leaves_out_heads_that_nobody_keeps,
    linear_bytes::columns_come_from_bytes,
    linear::tiled_products_with_ragged_edges,
    selection::heads,
    selection::neurons,
    selection::neurons_by_their_scores,
    sampling::ties_go_to_the_lower_token,
    sampling::counts_follow_sequences_that_grow_leave_and_return,
    sampling::every_kind_of_few_tokens,
    ops::attention_follows_the_hosts_tables,
    ops_mlp::mlp_runs_the_listed_neurons,
    ops_mlp::neurons_are_those_with_the_largest_sums,
];

#[test]
fn no_kernel_races() {
    #[cfg(feature = "cuda")]
    if crate::gpu::chosen().is_some() {
        return; // a GPU's time is not for what runs on the CPU
    }
    for case in CASES {
        with_races(*case);
    }
    let watched = host_device::watched();
    let families: Vec<String> = watched.iter().map(|name| family(name)).collect();
    let missing: Vec<_> = NAMES.iter().filter(|n| !families.contains(&family(n))).collect();
    // Those of synthetic.cu, which only benchmarks use.
    assert!(
        missing.iter().all(|n| ["read_stream", "fill_bf16", "fill_f16"].contains(n)),
        "not run: {missing:?}"
    );
}

/// A kernel's name without type and sizes: what has the same text.
fn family(name: &str) -> String {
    let size = |part: &&str| *part != "bf16" && *part != "f16" && part.parse::<u32>().is_err();
    name.split('_').filter(size).collect::<Vec<_>>().join("_")
}

/// In the order of `faults.cpp`, with what is found in two blocks, or nothing.
const FAULTS: &[(&str, &str)] = &[
    ("none", ""),
    ("no sync_block", "shared memory"),
    ("no sync_block after", "shared memory"),
    ("no sync_warp", "shared memory"),
    ("no barrier after a copy", "shared memory"),
    ("no sync_warp before a load", "shared memory"),
    ("no tile_wait", "shared memory"),
    ("no fence before", "global memory"),
    ("no fence after", "global memory"),
    ("one word", "global memory"),
    ("a counter is read", "atomic by"),
    ("an early store", "before it has waited"),
    ("an early load", "before it has waited"),
    ("a block too many is waited for", "wait for ever"),
    ("no cluster_wait", "shared memory"),
];

#[test]
fn seeded_faults_are_found() {
    let library = Library::watching(&root().join("tests/cuda_kernels/faults.cpp"));
    let launch = Launch { cluster: 3, ..Launch::new(Id(0), (3, 1), 64, 2048) };
    for (fault, (name, found)) in FAULTS.iter().enumerate() {
        for seed in 0..6 {
            let input: Vec<u32> = (0..192).collect();
            let mut output = vec![0u32; 6];
            let (from, to) = (input.as_ptr() as u64, output.as_mut_ptr() as u64);
            let params: Vec<u8> = [from, to, fault as u64].iter().flat_map(|v| v.to_le_bytes()).collect();
            let result = library.launch("faulty", &launch, seed, &[(Ptr(from), 768)], &params);
            match result {
                Ok(()) => assert!(found.is_empty(), "{name}, seed {seed}: not found"),
                Err(e) => assert!(!found.is_empty() && e.message.contains(found), "{name}: {e}"),
            }
        }
    }
}
