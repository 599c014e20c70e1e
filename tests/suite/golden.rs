//! A model says what its golden file has, or it is not served.

use anyhow::{Context, Result, ensure};
use dermflow_local::servers::{Given, Servers};
use dermflow_local::stack::repo;
use dermflow_tests::{
    client::sample,
    lab::{Lab, Setup, Worker},
    model::{Folder, initializers},
};
use dermflow_workers::{
    engine::{self, EngineError, Runtime},
    model::Model,
};

const DERM7: &str = "workers/models/derm7";
const TINY: &str = "tests/models/tiny";

// Each initializer of the default model in turn is altered by a twentieth, while the digest is made to fit: nearly all of
// them change what the network says so much that it is noticed. The digest alone tells of the others.
#[tokio::test]
async fn altered_weights_are_noticed_by_what_they_say() -> Result<()> {
    let servers = Servers::obtain(repo(), &Given::default(), |_| ()).await?;
    let runtime = Runtime::new(&servers.onnxruntime);
    let copy = Folder::of(DERM7)?;
    let original = copy.network()?;
    let load = || -> Result<_> { Ok(engine::factory(&Model::load(copy.path(), false)?, &runtime)?().err()) };
    ensure!(load()?.is_none(), "the original is refused");
    let golden = copy.read("golden.toml")?;
    let (mut noticed, mut missed) = (0, Vec::new());
    for initializer in initializers(&original)? {
        let mut file = original.clone();
        initializer.scale(&mut file, 1.05)?;
        copy.set_network(&file)?;
        std::fs::write(copy.path().join("golden.toml"), &golden)?;
        copy.adapt_digest(&original)?;
        match load()? {
            Some(EngineError::Golden(_)) => noticed += 1,
            Some(other) => return Err(other.into()),
            None => missed.push(initializer.name),
        }
    }
    println!("{noticed} altered initializers were noticed, not {missed:?}");
    ensure!(noticed >= 100 && noticed > 20 * missed.len(), "{noticed}, not {missed:?}");
    Ok(())
}

// What the description makes of the network counts as well: its input and its priors.
#[tokio::test]
async fn another_input_is_noticed() -> Result<()> {
    let servers = Servers::obtain(repo(), &Given::default(), |_| ()).await?;
    let runtime = Runtime::new(&servers.onnxruntime);
    let prior = Folder::of(DERM7)?.read("model.toml")?;
    // The largest one, of what the pictures look like most.
    let prior = prior.lines().filter(|line| line.starts_with("prior = ")).max();
    for (folder, old, new, word) in [
        (DERM7, "mean = [0.0, 0.0, 0.0]", "mean = [0.485, 0.456, 0.406]", "logits"),
        (DERM7, prior.context("no prior")?, "prior = 0.9", "probabilities"),
        (TINY, "mean = [0.485, 0.456, 0.406]", "mean = [0.406, 0.456, 0.485]", "logits"),
        (TINY, "height = 48", "height = 40", ""),
    ] {
        let copy = Folder::of(folder)?;
        copy.replace("model.toml", old, new)?;
        let refused = engine::factory(&Model::load(copy.path(), false)?, &runtime)?().err();
        let refused = refused.with_context(|| format!("{new} is not noticed"))?.to_string();
        ensure!(refused.contains(word), "{new}: {refused}");
    }
    Ok(())
}

// A worker with such a model does not start, and says why in a sentence; the command that makes the file anew makes it
// start.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_does_not_serve_a_model_that_says_something_else() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let copy = Folder::of(TINY)?;
    let original = copy.network()?;
    let refused = async |lab: &mut Lab, reasons: &[&str]| -> Result<()> {
        let refused = lab.start_worker(Worker::model(copy.path())).await.err().context("it starts")?;
        let refused = format!("{refused:#}");
        let folder = copy.path().display().to_string();
        ensure!(reasons.iter().chain([&folder.as_str()]).all(|reason| refused.contains(reason)), "{refused}");
        Ok(())
    };
    let mut file = original.clone();
    let weight =
        initializers(&original)?.into_iter().find(|found| found.name == "weight").context("no weight")?;
    // One value of nine.
    let first =
        dermflow_tests::model::Initializer { values: weight.values.start..weight.values.start + 4, ..weight };
    first.scale(&mut file, 1.02)?;
    copy.set_network(&file)?;
    refused(&mut lab, &["golden.toml: model.onnx is", "`worker golden FOLDER`"]).await?;
    copy.adapt_digest(&original)?;
    refused(&mut lab, &["does not say what golden.toml has: picture 0, logits:"]).await?;
    std::fs::remove_file(copy.path().join("golden.toml"))?;
    refused(&mut lab, &["golden.toml: No such file"]).await?;
    copy.write_golden().await?;
    lab.start_worker(Worker::model(copy.path())).await?;
    assert_eq!(lab.client().analyze(&sample("ham10000-mel.jpg"), &[]).await?.status, 200);
    lab.stop().await
}

// The files in the repository are those that the command writes.
#[tokio::test]
async fn the_command_writes_the_golden_files_that_are_there() -> Result<()> {
    for folder in [DERM7, TINY] {
        let copy = Folder::of(folder)?;
        let written = copy.read("golden.toml")?;
        std::fs::remove_file(copy.path().join("golden.toml"))?;
        copy.write_golden().await?;
        // Numbers differ in the last digits where processors do.
        let shape = |text: &str| text.replace(|c: char| c.is_ascii_digit() || "-.e".contains(c), "");
        assert_eq!(shape(&copy.read("golden.toml")?), shape(&written));
        assert_eq!(
            copy.read("golden.toml")?.lines().take(2).collect::<Vec<_>>(),
            written.lines().take(2).collect::<Vec<_>>()
        );
    }
    let simulated = Folder::simulated("1", 1, "")?;
    let refused = simulated.write_golden().await.err().context("a simulated model has a golden file")?;
    let refused = format!("{refused:#}");
    ensure!(refused.contains("simulated"), "{refused}");
    Ok(())
}
