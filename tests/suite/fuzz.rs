//! The corpus of the fuzz targets, tried without a fuzzer.

#[path = "../fuzz/oracles.rs"]
mod oracles;

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};

// Each input of the corpus, and what becomes of it when it is cut or doubled, goes through its target.
#[test]
fn every_input_of_the_corpus_is_still_good() -> Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let (mut files, mut bytes) = (0, 0);
    for target in oracles::TARGETS {
        let folder = corpus.join(target.0);
        let inputs = fs::read_dir(&folder).with_context(|| folder.display().to_string())?;
        let mut tried = 0;
        for input in inputs {
            let path = input?.path();
            let input = fs::read(&path)?;
            println!("{}", path.display());
            for input in [&input[..], &input[..input.len() / 2], &input.repeat(2)] {
                oracles::run(target, input);
            }
            tried += 1;
            bytes += input.len();
        }
        ensure!(tried > 0, "{} has no corpus", target.0);
        files += tried;
    }
    ensure!(fs::read_dir(&corpus)?.count() == oracles::TARGETS.len(), "a folder a target");
    ensure!(files < 300 && bytes < 500_000, "the corpus has {files} files of {bytes} bytes");
    Ok(())
}
