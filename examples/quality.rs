//! The quality table of the trained fixtures: perplexity of teacher-forced decode on held-out text,
//! dense and at several densities, for oracle, router, static and random selection.
//!
//! `cargo run --release --example quality -- [--windows N] [--weight-dtype int8] [--brief] [FIXTURE_DIR]`
//! prints it as Markdown; `make quality` writes it to `fixtures/quality.md`.

#![allow(clippy::print_stdout, reason = "a program that prints a table")]
#![allow(unreachable_pub, reason = "a program: its modules have no other users")]

#[path = "support/teacher.rs"]
mod teacher;

use polar_sparsity::dtype::DType;
use polar_sparsity::engine::{Context, ContextOptions, LoadOptions, Model, Routers};
use polar_sparsity::sparsity::{MlpMode, Source};
use std::path::{Path, PathBuf};
use teacher::{Cell, Score, agreement, paired, perplexity, read_windows, score};

const DENSITIES: [f32; 4] = [0.75, 0.625, 0.5, 0.375];
const BATCH: u32 = 32;

struct Args {
    fixtures: PathBuf,
    windows: usize,
    weight_dtype: Option<DType>,
    /// Dense and one density only: what another weight type costs.
    brief: bool,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = parse()?;
    let mut windows = read_windows(&args.fixtures.join("test_windows.u16"))?;
    windows.truncate(args.windows);
    let scored = windows.len() * teacher::SCORED;
    println!("Teacher-forced decode of held-out text, {} windows, {scored} scored tokens.", windows.len());
    println!(
        "dNLL: increase of the mean negative log likelihood (nats per token) over dense, ± standard error over windows."
    );
    println!("Top-1: share of positions whose most likely token is dense's.\n");
    let ctx = Context::new(&ContextOptions::default())?;
    for name in ["opt-tiny", "llama-tiny"] {
        table(&ctx, &args.fixtures.join(name), &args, &windows)?;
    }
    Ok(())
}

fn parse() -> Result<Args, String> {
    let mut args =
        Args { fixtures: PathBuf::from("fixtures"), windows: usize::MAX, weight_dtype: None, brief: false };
    let mut given = std::env::args().skip(1);
    while let Some(arg) = given.next() {
        match arg.as_str() {
            "--windows" => {
                let n = given.next().and_then(|n| n.parse().ok());
                args.windows = n.ok_or("--windows takes a number")?;
            }
            "--weight-dtype" => match given.next().as_deref() {
                Some("int8") => args.weight_dtype = Some(DType::I8),
                other => return Err(format!("--weight-dtype takes int8, not {other:?}")),
            },
            "--brief" => args.brief = true,
            dir if !dir.starts_with('-') => args.fixtures = PathBuf::from(dir),
            other => return Err(format!("unknown option {other}")),
        }
    }
    Ok(args)
}

fn table(
    ctx: &Context,
    dir: &Path,
    args: &Args,
    windows: &[Vec<i32>],
) -> Result<(), Box<dyn std::error::Error>> {
    let load = LoadOptions { weight_dtype: args.weight_dtype, ..LoadOptions::default() };
    let model = Model::load(ctx, dir, &load, &mut |_, _| 0)?;
    let routers = Routers::load(&model, &dir.join("routers.safetensors"), &load)?;
    let fixed = Routers::load(&model, &dir.join("routers_static.safetensors"), &load)?;
    let run = |routers, source, density, mlp| {
        score(&model, routers, Cell { source, attn_density: density, mlp }, windows, BATCH)
    };
    let dense = run(None, Source::Router, 1.0, MlpMode::Dense)?;
    let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let dtype = args.weight_dtype.unwrap_or(model.spec().dtype).name();
    println!("### {name}, {dtype} weights: dense perplexity {:.4}\n", perplexity(&dense));
    println!(
        "| selection | density asked | attention density reached | MLP density reached | perplexity | dNLL | top-1 |"
    );
    println!("|---|---|---|---|---|---|---|");
    if args.brief {
        row("router", 0.5, &run(Some(&routers), Source::Router, 0.5, MlpMode::Dense)?, &dense);
        println!();
        return Ok(());
    }
    for density in DENSITIES {
        row("oracle", density, &run(None, Source::Oracle, density, MlpMode::Dense)?, &dense);
        row("router", density, &run(Some(&routers), Source::Router, density, MlpMode::Dense)?, &dense);
        row("static", density, &run(Some(&fixed), Source::Router, density, MlpMode::Dense)?, &dense);
        row("random", density, &run(None, Source::Random { seed: 1 }, density, MlpMode::Dense)?, &dense);
    }
    if routers.info().mlp.is_some() {
        row(
            "MLP routers, each sequence's own K(1)",
            1.0,
            &run(Some(&routers), Source::Router, 1.0, MlpMode::Invariant)?,
            &dense,
        );
        row(
            "MLP routers, batch of 32",
            1.0,
            &run(Some(&routers), Source::Router, 1.0, MlpMode::Reference)?,
            &dense,
        );
        row(
            "attention and MLP routers, K(1)",
            0.5,
            &run(Some(&routers), Source::Router, 0.5, MlpMode::Invariant)?,
            &dense,
        );
    }
    println!();
    Ok(())
}

fn row(what: &str, density: f32, scores: &[Score], dense: &[Score]) {
    let n = scores.len() as f32;
    let attn = scores.iter().map(|s| s.attn_density).sum::<f32>() / n;
    let mlp = scores.iter().map(|s| s.mlp_density).sum::<f32>() / n;
    let (mean, se) = paired(scores, dense);
    println!(
        "| {what} | {density} | {attn:.3} | {mlp:.3} | {:.4} | {mean:+.4} ± {se:.4} | {:.3} |",
        perplexity(scores),
        agreement(scores, dense)
    );
}
