//! x
#[tokio::main]
async fn main() {
    let repo = std::path::PathBuf::from(std::env::args().nth(1).unwrap());
    println!("{:?}", dermflow_local::servers::Servers::obtain(&repo, &Default::default(), |s| println!("{s}")).await);
}
