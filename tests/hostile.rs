//! Files made to hurt. Whatever their bytes say, opening them is an error with one line of text:
//! never a panic, an abort, a hang, or memory of the size a file merely claims.

#![allow(clippy::unwrap_used, reason = "tests")]

mod files;

use files::*;
use polar_sparsity::Result;
use polar_sparsity::error::Status;
use polar_sparsity::format::{Limits, Shards, TensorSource, open_model_dir};
use polar_sparsity::model::{Weights, load};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

fn status<T>(result: Result<T>) -> (Status, String) {
    let e = result.err().expect("an error");
    assert!(!e.message.contains(['\n', '\r', '\0']), "{e:?}");
    assert!(e.message.len() < 800, "{e}");
    (e.status, e.message.into_owned())
}

fn open(file: Vec<u8>) -> Result<Shards> {
    Shards::from_bytes(file, &Limits::default())
}

fn tiny() -> (String, Vec<u8>, usize) {
    let parts = Parts { head: true, ..Parts::default() };
    let file = safetensors(&llama_tensors("model.", 1, "BF16", parts), &[("format", "pt")]);
    let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    (llama_config("llama", 1, "{}"), file, header)
}

#[test]
fn truncated_anywhere() {
    let (config, file, header) = tiny();
    checkpoint(&config, file.clone()).unwrap();
    let data = (header..file.len()).filter(|n| *n < header + 40 || n % 97 == 0 || *n + 40 > file.len());
    for n in (0..header).chain(data) {
        assert_eq!(status(checkpoint(&config, file[..n].to_vec())).0, Status::E_FORMAT, "{n} bytes");
    }
    let mut longer = file;
    longer.push(0);
    assert_eq!(status(checkpoint(&config, longer)).0, Status::E_FORMAT);
}

#[test]
fn single_bits_flipped_in_the_header() {
    let (config, file, header) = tiny();
    // A flipped bit in the free text of the metadata is the only one that may go unnoticed.
    let text = br#"{"__metadata__":{"format":"pt"}"#.len() + 8;
    for at in 0..header {
        for bit in 0..8 {
            let mut bad = file.clone();
            bad[at] ^= 1 << bit;
            match checkpoint(&config, bad) {
                Ok(_) => assert!(at < text, "bit {bit} of byte {at} went unnoticed"),
                Err(e) => assert!(e.status.is_error() && !e.message.contains('\n'), "{e}"),
            }
        }
    }
}

#[test]
fn crafted_lengths() {
    for (length, expected) in [
        (0u64, Status::E_FORMAT),
        (1, Status::E_FORMAT),
        (u64::MAX, Status::E_FORMAT),
        (u64::MAX - 7, Status::E_FORMAT),
        (1 << 63, Status::E_FORMAT),
        (3, Status::E_FORMAT),
    ] {
        let mut file = length.to_le_bytes().to_vec();
        file.extend(b"{}");
        assert_eq!(status(open(file)).0, expected, "{length}");
    }
    let small = Limits { max_header_bytes: 100, ..Limits::default() };
    assert_eq!(
        status(Shards::from_bytes(raw(&format!("{{{}}}", " ".repeat(100)), &[]), &small)).0,
        Status::E_LIMIT
    );
    let small = Limits { max_file_bytes: 100, ..Limits::default() };
    assert_eq!(status(Shards::from_bytes(tiny().1, &small)).0, Status::E_LIMIT);
    // A file of holes claims more than the cap, and has it: refused before it is read.
    let folder = Folder::new();
    let path = folder.write("big.safetensors", (17u64 << 20).to_le_bytes());
    std::fs::File::options().write(true).open(&path).unwrap().set_len(64 << 20).unwrap();
    assert_eq!(status(Shards::open(&path, &Limits::default())).0, Status::E_LIMIT);
}

#[test]
fn crafted_headers() {
    let one = |entry: &str| format!("{{\"a\":{entry}}}");
    let f32_of = |shape: &str, end: u64| {
        one(&format!("{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[0,{end}]}}"))
    };
    let entry = "{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}";
    let many = |n: usize| {
        let entries: Vec<String> = (0..n)
            .map(|i| format!("\"t{i}\":{{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}"))
            .collect();
        format!("{{{}}}", entries.join(","))
    };
    for (header, data, expected, words) in [
        ("", 0, Status::E_FORMAT, "not a JSON object"),
        (" {}", 0, Status::E_FORMAT, "not a JSON object"),
        ("[]", 0, Status::E_FORMAT, "not a JSON object"),
        ("{not json", 0, Status::E_FORMAT, "header"),
        ("{} {}", 0, Status::E_FORMAT, "trailing"),
        (&one(&"[".repeat(10_000)), 0, Status::E_LIMIT, "nested deeper than 64"),
        (&format!("{{\"a\":{}", "{\"a\":".repeat(10_000)), 0, Status::E_LIMIT, "nested deeper"),
        (&many(100_000), 0, Status::E_LIMIT, "at most 65536"),
        (&format!("{{\"a\":{entry},\"a\":{entry}}}"), 4, Status::E_FORMAT, "tensor a is listed twice"),
        (&format!("{{\"a\":{entry},\"\\u0061\":{entry}}}"), 4, Status::E_FORMAT, "tensor a is listed twice"),
        ("{\"__metadata__\":{},\"__metadata__\":{}}", 0, Status::E_FORMAT, "__metadata__ is listed twice"),
        ("{\"__metadata__\":{\"k\":\"1\",\"k\":\"2\"}}", 0, Status::E_FORMAT, "has k twice"),
        ("{\"__metadata__\":{\"k\":1}}", 0, Status::E_FORMAT, "header"),
        ("{\"__metadata__\":7}", 0, Status::E_FORMAT, "__metadata__"),
        (&format!("{{\"{}\":{entry}}}", "n".repeat(257)), 4, Status::E_LIMIT, "257 bytes, at most 256"),
        (&format!("{{\"a\\nb\":{entry}}}"), 4, Status::E_FORMAT, "control characters"),
        (&format!("{{\"\":{entry}}}"), 4, Status::E_FORMAT, "is empty"),
        (&f32_of("[1,1,1,1,1]", 4), 4, Status::E_LIMIT, "rank 5 stored, at most 4"),
        (&f32_of(&format!("[{}1]", "1,".repeat(1_000_000)), 4), 4, Status::E_LIMIT, "more than 64 items"),
        (&f32_of("[2147483649]", 4), 4, Status::E_LIMIT, "dimension 2147483649"),
        (&f32_of("[2147483648,2147483648,2147483648]", 4), 4, Status::E_FORMAT, "overflows"),
        (&f32_of("[2147483648,2147483648]", 4), 4, Status::E_FORMAT, "overflows"),
        (&f32_of("[-1]", 4), 4, Status::E_FORMAT, "tensor a"),
        (&f32_of("[1.5]", 4), 4, Status::E_FORMAT, "tensor a"),
        (&f32_of("[18446744073709551616]", 4), 4, Status::E_FORMAT, "tensor a"),
        (&f32_of("[2]", 4), 4, Status::E_FORMAT, "bytes 0 to 4 stored, 8 bytes needed by shape [2] of F32"),
        (&f32_of("[1]", 4), 3, Status::E_FORMAT, "3 bytes of tensor data stored, 4 needed"),
        (&f32_of("[1]", 4), 5, Status::E_FORMAT, "5 bytes of tensor data stored, 4 needed"),
        (
            &one("{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}"),
            4,
            Status::E_FORMAT,
            "starts at byte 4",
        ),
        (&one("{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}"), 4, Status::E_FORMAT, "tensor a"),
        (&one("{\"dtype\":\"F99\",\"shape\":[1],\"data_offsets\":[0,4]}"), 4, Status::E_FORMAT, "F99"),
        (&one("{\"dtype\":\"F4\",\"shape\":[1],\"data_offsets\":[0,1]}"), 1, Status::E_FORMAT, "tensor a"),
        (&one("{\"dtype\":\"F32\",\"shape\":[1]}"), 4, Status::E_FORMAT, "data_offsets"),
        (
            &one("{\"dtype\":\"F32\",\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}"),
            4,
            Status::E_FORMAT,
            "tensor a",
        ),
    ] {
        let (status, message) = status(open(raw(header, &vec![0; data])));
        let shown = &header[..header.len().min(100)];
        assert_eq!(status, expected, "{shown}: {message}");
        assert!(message.contains(words), "{shown}: {message}");
    }
}

#[test]
fn overlaps_and_holes() {
    let two = |second: &str| {
        raw(
            &format!(
                "{{\"a\":{{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}},
                   \"b\":{{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":{second}}}}}"
            ),
            &[0; 16],
        )
    };
    open(two("[8,16]")).unwrap();
    for (second, words) in [
        ("[0,8]", "tensor b overlaps"),
        ("[4,12]", "tensor b overlaps the tensor before it: it starts at byte 4, the one before ends at 8"),
        ("[9,17]", "tensor b leaves a hole"),
        ("[18446744073709551608,0]", "tensor b leaves a hole"),
        ("[8,18446744073709551615]", "tensor b: bytes 8 to"),
    ] {
        let (code, message) = status(open(two(second)));
        assert_eq!(code, Status::E_FORMAT, "{message}");
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn invalid_utf8() {
    let (config, mut file, _) = tiny();
    file[20] = 0xff;
    assert_eq!(status(checkpoint(&config, file)).0, Status::E_FORMAT);
}

#[test]
fn reads_beyond_a_tensor() {
    let s = open(safetensors(&[tensor("a", "F32", &[2]), tensor("b", "F32", &[2])], &[])).unwrap();
    for (offset, len) in [(0, 9), (8, 1), (9, 0), (u64::MAX, 1), (u64::MAX - 3, 8)] {
        let e = s.read("a", offset, &mut vec![0; len]).unwrap_err();
        assert_eq!(e.status, Status::E_INVALID);
    }
    s.read("a", 8, &mut []).unwrap();
    assert_eq!(s.read("c", 0, &mut []).unwrap_err().status, Status::E_MODEL);
    let (config, file, _) = tiny();
    let c = checkpoint(&config, file).unwrap();
    for (first, count, len) in
        [(0, 33, 33 * 32), (32, 1, 32), (usize::MAX, 1, 32), (0, 1, 31), (0, usize::MAX, 0)]
    {
        let e = c.read_rows(polar_sparsity::model::Role::Embed, first, count, &mut vec![0; len]).unwrap_err();
        assert_eq!(e.status, Status::E_INVALID, "{first} {count}");
    }
}

#[test]
fn things_that_are_no_files() {
    let (config, file, _) = tiny();
    let limits = Limits::default();
    let folder = Folder::new();
    assert_eq!(status(load(&folder.path().join("none"), &limits)).0, Status::E_IO);
    assert_eq!(status(load(folder.path(), &limits)).0, Status::E_IO);
    let config_path = folder.write("config.json", &config);
    let (code, message) = status(load(folder.path(), &limits));
    assert_eq!(code, Status::E_FORMAT);
    assert!(message.contains("model.safetensors"), "{message}");
    folder.write("pytorch_model.bin", "x");
    assert!(status(load(folder.path(), &limits)).1.contains("pytorch_model.bin is not read"));

    let model = folder.path().join("model.safetensors");
    std::fs::create_dir(&model).unwrap();
    assert!(status(load(folder.path(), &limits)).1.contains("a folder"));
    std::fs::remove_dir(&model).unwrap();

    assert!(Command::new("mkfifo").arg(&model).status().unwrap().success());
    let start = Instant::now();
    assert!(status(load(folder.path(), &limits)).1.contains("a FIFO"));
    assert!(start.elapsed() < Duration::from_secs(5), "opening a FIFO waited");
    std::fs::remove_file(&model).unwrap();

    std::os::unix::fs::symlink("nowhere", &model).unwrap();
    assert_eq!(status(load(folder.path(), &limits)).0, Status::E_IO);
    std::fs::remove_file(&model).unwrap();

    folder.write("model.safetensors", "");
    assert!(status(load(folder.path(), &limits)).1.contains("0 bytes stored"));
    folder.write("model.safetensors", &file);
    load(folder.path(), &limits).unwrap();

    for bad in ["", "{", "[]", "{\"model_type\":\"llama\",\"model_type\":\"opt\"}", "\u{feff}{}"] {
        std::fs::write(&config_path, bad).unwrap();
        assert_eq!(status(load(folder.path(), &limits)).0, Status::E_FORMAT, "{bad}");
    }
    std::fs::write(&config_path, format!("{{\"a\":\"{}\"}}", "x".repeat(2 << 20))).unwrap();
    assert_eq!(status(load(folder.path(), &limits)).0, Status::E_LIMIT);
    std::fs::write(&config_path, &config).unwrap();
    folder.write("generation_config.json", "{\"eos_token_id\":");
    assert_eq!(status(load(folder.path(), &limits)).0, Status::E_FORMAT);
}

#[test]
fn shard_indices() {
    let (config, _, _) = tiny();
    let parts = Parts { head: true, ..Parts::default() };
    let tensors = llama_tensors("model.", 1, "BF16", parts);
    let (first, second) = tensors.split_at(5);
    let map: Vec<String> = tensors
        .iter()
        .enumerate()
        .map(|(i, t)| format!("\"{}\":\"{}\"", t.name, if i < 5 { "a.safetensors" } else { "b.safetensors" }))
        .collect();
    let index = |map: &str| format!("{{\"metadata\":{{\"total_size\":1}},\"weight_map\":{{{map}}}}}");
    let map = map.join(",");
    let folder = Folder::new();
    folder.write("config.json", &config);
    folder.write("a.safetensors", safetensors(first, &[]));
    folder.write("b.safetensors", safetensors(second, &[]));
    let load = |text: &str| {
        folder.write("model.safetensors.index.json", text);
        load(folder.path(), &Limits::default())
    };
    let whole = load(&index(&map)).unwrap();
    assert_eq!(whole.total_bytes(), tensors.iter().map(|t| t.data.len() as u64).sum::<u64>());
    for (from, to, expected, words) in [
        ("b.safetensors", "../b.safetensors", Status::E_FORMAT, "plain file name"),
        ("b.safetensors", "/b.safetensors", Status::E_FORMAT, "plain file name"),
        ("b.safetensors", "..", Status::E_FORMAT, "plain file name"),
        ("b.safetensors", "c.safetensors", Status::E_IO, "c.safetensors"),
        (
            "lm_head.weight\":\"a",
            "lm_head.weight\":\"b",
            Status::E_FORMAT,
            "lm_head.weight is not in b.safetensors",
        ),
        ("lm_head.weight", "other.weight", Status::E_FORMAT, "other.weight is not in"),
    ] {
        let (code, message) = status(load(&index(&map.replace(from, to))));
        assert_eq!(code, expected, "{to}: {message}");
        assert!(message.contains(words), "{to}: {message}");
    }
    for text in ["", "{}", "{\"weight_map\":[]}", "{\"weight_map\":{\"a\":\"x\",\"a\":\"x\"}}"] {
        assert_eq!(status(load(text)).0, Status::E_FORMAT, "{text}");
    }
    // The same tensor in two shards.
    let both: Vec<Tensor> = second.iter().chain(&first[..1]).cloned().collect();
    folder.write("b.safetensors", safetensors(&both, &[]));
    let (code, message) = status(load(&index(&map)));
    assert_eq!(code, Status::E_FORMAT);
    assert!(
        message.contains("model.embed_tokens.weight is stored twice, in a.safetensors and in b.safetensors")
    );
    // All shards together above the limit.
    let small = Limits { max_file_bytes: 4000, ..Limits::default() };
    assert_eq!(status(open_model_dir(folder.path(), &small)).0, Status::E_LIMIT);
}

#[test]
fn a_file_that_changes_while_it_is_read() {
    let big = vec![tensor("a", "F32", &[1 << 19])];
    let folder = Folder::new();
    for grow in [false, true] {
        let path = folder.write("model.safetensors", safetensors(&big, &[]));
        let source = Shards::open(&path, &Limits::default()).unwrap();
        let started = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !started.load(Ordering::Acquire) {
                    std::thread::yield_now();
                }
                let file = std::fs::File::options().write(true).open(&path).unwrap();
                file.set_len(if grow { 4 << 20 } else { 1 << 20 }).unwrap();
            });
            let mut buffer = vec![0; 2 << 20];
            let end = Instant::now() + Duration::from_secs(20);
            let e = loop {
                assert!(Instant::now() < end, "a changed file was read for 20 s");
                started.store(true, Ordering::Release);
                if let Err(e) = source.read("a", 0, &mut buffer) {
                    break e;
                }
            };
            assert_eq!(e.status, Status::E_IO, "{e}");
        });
    }
}
