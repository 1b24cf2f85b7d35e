//! The ABI as it is committed: exported symbols, link flags, and where each field lies, as C sees it
//! and as Rust sees it. A difference is a break for every program that was compiled before.
//! `make header` (POLAR_WRITE_HEADER=1) writes the lists.

mod common;

use common::{Library, built_library, compiler, root, run, scratch};
use polar_sparsity::ffi::*;
use std::fs;
use std::mem::offset_of;
use std::process::Command;

fn compare(file: &str, now: &str) {
    let path = root().join("tests/abi").join(file);
    if std::env::var_os("POLAR_WRITE_HEADER").is_some() {
        fs::write(&path, now).expect("writable");
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == now, "tests/abi/{file} differs; this build has:\n{now}");
}

fn symbols() -> Vec<String> {
    let text = run(Command::new("nm").args(["-D", "--defined-only"]).arg(built_library()));
    let mut names: Vec<String> =
        text.lines().filter_map(|line| line.split_whitespace().nth(2)).map(str::to_owned).collect();
    names.sort();
    names
}

#[test]
fn only_the_abi_is_exported() {
    let names = symbols();
    assert!(names.iter().all(|n| n.starts_with("polar_")), "{names:?}");
    let normal: Vec<_> = names.into_iter().filter(|n| n != "polar_test_panic_at").collect();
    compare("symbols.txt", &(normal.join("\n") + "\n"));
}

#[test]
fn link_flags_are_in_place() {
    let text = run(Command::new("readelf").args(["-dlW"]).arg(built_library()));
    for wanted in ["soname: [libpolar_sparsity.so.0]", "NODELETE", "BIND_NOW", "GNU_RELRO"] {
        assert!(text.contains(wanted), "{wanted} is missing:\n{text}");
    }
    let stack = text.lines().find(|line| line.contains("GNU_STACK")).expect("a stack segment");
    assert!(!stack.contains("RWE"), "executable stack: {stack}");
}

/// Each function is tried with NULL, and has its place in the C++ and in the Go wrapper.
#[test]
fn every_function_is_tested_and_wrapped() {
    /// Only for hosts that bind C themselves.
    const NOT_IN_CPP: &[&str] = &["polar_build_info"];
    /// Go has no C callbacks: it polls instead. Nor does it own device memory or streams, so that the
    /// operators, all that begins with `polar_op_`, would have nothing to work on.
    const NOT_IN_GO: &[&str] = &["polar_log_set"];
    for (files, exceptions) in [
        (&["tests/c/null.c"][..], &[][..]),
        (&["include/polar_sparsity.hpp"], NOT_IN_CPP),
        (&["bindings/go/polar.go", "bindings/go/engine.go"], NOT_IN_GO),
    ] {
        let read = |file: &&str| fs::read_to_string(root().join(file)).expect(file);
        let text: String = files.iter().map(read).collect();
        for name in symbols().iter().filter(|n| *n != "polar_test_panic_at") {
            let there = text.match_indices(&**name).any(|(at, _)| {
                !text[at + name.len()..].starts_with(|c: char| c.is_alphanumeric() || c == '_')
            });
            let elsewhere = exceptions == NOT_IN_GO && name.starts_with("polar_op_");
            assert!(there || elsewhere || exceptions.contains(&&**name), "{name} is not in {files:?}");
        }
    }
}

macro_rules! layouts {
    ($($name:ident { $($field:ident),* })*) => {
        /// Struct, then its fields.
        const FIELDS: &[(&str, &[&str])] = &[$((stringify!($name), &[$(stringify!($field)),*])),*];

        fn layout_in_rust() -> String {
            let mut lines = Vec::new();
            $(
                lines.push(format!("{} {}", stringify!($name), size_of::<$name>()));
                $(lines.push(format!("{}.{} {}", stringify!($name), stringify!($field), offset_of!($name, $field)));)*
            )*
            lines.join("\n") + "\n"
        }
    };
}

layouts! {
    polar_error { struct_size, code, os_code, device_code, message }
    polar_context_options { struct_size, backend, threads, log_level, log_ring_kib, flags, max_file_bytes, max_header_bytes }
    polar_device_info { struct_size, ordinal, backend, compute_capability, memory_total, memory_free, usable, reserved, name, uuid }
    polar_load_options { struct_size, device, weight_dtype, flags }
    polar_model_info { struct_size, vocab_size, num_layers, num_heads, num_kv_heads, head_dim, hidden_size, ffn_size, max_positions, dtype, bos_token, n_eos, eos_tokens, weight_bytes, family, device_name }
    polar_estimate { struct_size, fits, max_batch, max_context, weight_bytes, router_bytes, scratch_bytes, page_bytes, token_bytes, kv_pages, needed_bytes, free_bytes, max_kv_pages, max_contexts }
    polar_engine_options { struct_size, max_batch, max_queue, page_tokens, step_tokens, max_context, kv_bytes, attn_density, mlp_density, mlp_dense_above, mlp_mode, attn_source, flags, attn_seed }
    polar_request { user_tag, random_seed, first_token, n_tokens, first_stop, n_stop, max_new_tokens, flags, priority, n_logprobs, temperature, top_p, min_p, top_k, repetition_penalty, presence_penalty, frequency_penalty, attn_density, mlp_mode, reserved }
    polar_event { seq, user_tag, token, logprob, flags, reason, status, n_logprobs, first_logprob, n_generated, attn_density, mlp_density, reserved }
    polar_logprob { token, logprob }
    polar_stats { struct_size, health, steps, tokens_in, tokens_out, requests_accepted, requests_finished, admission_refusals, preemptions, waiting, running, kv_pages_total, kv_pages_free, attn_units_run, attn_units_total, mlp_units_run, mlp_units_total, kv_bytes_read, kv_bytes_dense, nan_scores, step_ns_last, step_ns_max, step_ns_total, log_lines_dropped }
    polar_op_attention { struct_size, dtype, num_sequences, num_heads, num_kv_heads, head_dim, max_pages, block_table_stride, window, scale, flags, reserved, q_stride, page_stride, head_stride, q, kv, block_table, seq_lens, keep, selected, out, lse, workspace, workspace_bytes }
    polar_op_head_selection { struct_size, dtype, num_sequences, num_kv_heads, router_rows, hidden_size, group_width, reserved, x, weight, bias, logits, keep, selected, attention_out, nan_count, workspace, workspace_bytes }
    polar_op_neuron_selection { struct_size, dtype, num_rows, num_neurons, keep, hidden_size, rank, reserved, x, router_down, router_up, logits, active_rows, index, nan_count, workspace, workspace_bytes }
    polar_op_mlp { struct_size, dtype, num_rows, hidden_size, num_neurons, keep, x, up, up_bias, down, down_bias, index, out, workspace, workspace_bytes }
}

fn layout_in_c() -> String {
    let mut body = String::new();
    for (name, fields) in FIELDS {
        body += &format!("  printf(\"{name} %zu\\n\", sizeof({name}));\n");
        for field in *fields {
            body += &format!("  printf(\"{name}.{field} %zu\\n\", offsetof({name}, {field}));\n");
        }
    }
    let library = Library::link(scratch("layout"));
    let (file, program) = (library.folder.join("layout.c"), library.folder.join("layout"));
    let text = format!(
        "#include <stdio.h>\n#include \"polar_sparsity.h\"\nint main(void) {{\n{body}  return 0;\n}}\n"
    );
    fs::write(&file, text).expect("writable");
    let mut command = Command::new(compiler("cc").expect("a C compiler"));
    run(command.arg("-I").arg(root().join("include")).arg(&file).arg("-o").arg(&program));
    run(&mut Command::new(&program))
}

#[test]
fn c_and_rust_agree_on_every_field() {
    assert_eq!(layout_in_c(), layout_in_rust());
    compare("layout.txt", &layout_in_rust());
}

/// The table above lists every field of the header's structs.
#[test]
fn no_field_is_missing_from_the_table() {
    let header = fs::read_to_string(root().join("include/polar_sparsity.h")).expect("there");
    let mut fields: Vec<String> = Vec::new();
    for line in header.lines() {
        if line == "typedef struct {" {
            fields.clear();
        } else if let Some(name) = line.strip_prefix("} polar_") {
            let name = format!("polar_{}", name.trim_end_matches(';'));
            let (_, known) = FIELDS.iter().find(|(n, _)| *n == name).unwrap_or_else(|| panic!("{name}"));
            assert_eq!(fields, *known, "{name}");
        } else if line.starts_with("  ") && line.ends_with(';') && !line.contains("//") {
            let name = line.trim_end_matches(';').split(' ').next_back().unwrap_or("");
            fields.push(name.split('[').next().unwrap_or("").to_owned());
        }
    }
}

/// Cargo.toml, the header and what gets installed name the same version.
#[test]
fn one_version_everywhere() {
    let header = fs::read_to_string(root().join("include/polar_sparsity.h")).expect("there");
    for (macro_name, value) in [
        ("POLAR_VERSION_MAJOR", env!("CARGO_PKG_VERSION_MAJOR")),
        ("POLAR_VERSION_MINOR", env!("CARGO_PKG_VERSION_MINOR")),
        ("POLAR_VERSION_PATCH", env!("CARGO_PKG_VERSION_PATCH")),
    ] {
        assert!(header.contains(&format!("#define {macro_name} {value}\n")), "{macro_name}");
    }
    let changelog = fs::read_to_string(root().join("CHANGELOG.md")).expect("there");
    assert!(changelog.contains(env!("CARGO_PKG_VERSION")), "CHANGELOG.md does not name this version");
}
