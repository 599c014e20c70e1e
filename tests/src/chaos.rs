//! A network that misbehaves on demand: a proxy for one link, below TLS, whose mode changes while it runs.

use std::{
    io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result};
use dermflow_local::ports;
use dermflow_schemas::random::Rng;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{mpsc, watch},
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep_until},
};

use crate::form::seed;

/// Bytes that are read at once: what [`Mode::Reset`] rolls the dice for.
const CHUNK_BYTES: usize = 64 * 1024;
/// Chunks under way in one direction of one connection; then the sender is held up.
const CHUNKS: usize = 256;

/// What a link does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// What it should.
    Pass,
    /// Every connection is reset, and new ones are refused.
    Cut,
    /// Connections are accepted, and nothing moves, in either direction. What is under way arrives afterwards.
    Blackhole,
    /// Everything arrives later by this much, in both directions.
    Delay(Duration),
    /// For each chunk, the connection is reset with this probability, in per cent.
    Reset(u64),
}

/// Where a proxy listens or connects to.
#[derive(Debug, Clone)]
enum Address {
    Tcp(u16),
    Unix(PathBuf),
}

/// A proxy of one link. Dropping it cuts the link.
#[derive(Debug)]
pub struct Proxy {
    near: Address,
    mode: watch::Sender<Mode>,
    tally: Arc<Tally>,
    serving: JoinHandle<()>,
}

/// What a proxy has done.
#[derive(Debug, Default)]
struct Tally {
    connections: AtomicU64,
    resets: AtomicU64,
    chunks: AtomicU64,
}

impl Proxy {
    /// A proxy of the TCP port `to` of the loopback address. It prints the seed of its dice.
    ///
    /// # Errors
    /// When no port is free.
    pub async fn tcp(to: u16) -> Result<Self> {
        let port = ports::free()?;
        let first = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await?;
        Ok(Self::start(Address::Tcp(port), Address::Tcp(to), Listener::Tcp(first)))
    }

    /// A proxy of a Unix socket, listening at `near`.
    ///
    /// # Errors
    /// When it cannot listen there.
    pub fn unix(near: &Path, to: &Path) -> Result<Self> {
        let first = UnixListener::bind(near).with_context(|| near.display().to_string())?;
        Ok(Self::start(Address::Unix(near.into()), Address::Unix(to.into()), Listener::Unix(first)))
    }

    fn start(near: Address, to: Address, first: Listener) -> Self {
        let (mode, modes) = watch::channel(Mode::Pass);
        let tally = Arc::new(Tally::default());
        let link = Link { to, modes, dice: Dice::new(seed()), tally: tally.clone() };
        let serving = tokio::spawn(serve(near.clone(), link, first));
        Self { near, mode, tally, serving }
    }

    /// The port that it listens on; 0 for a Unix socket.
    pub fn port(&self) -> u16 {
        match self.near {
            Address::Tcp(port) => port,
            Address::Unix(_) => 0,
        }
    }

    /// Changes what it does, from now on.
    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    /// Connections that were reset by [`Mode::Cut`] or [`Mode::Reset`].
    pub fn resets(&self) -> u64 {
        self.tally.resets.load(Ordering::Relaxed)
    }

    /// Chunks that were passed on.
    pub fn chunks(&self) -> u64 {
        self.tally.chunks.load(Ordering::Relaxed)
    }

    /// Connections that were accepted.
    pub fn connections(&self) -> u64 {
        self.tally.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.serving.abort();
        if let Address::Unix(path) = &self.near {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[derive(Debug, Clone)]
struct Link {
    to: Address,
    modes: watch::Receiver<Mode>,
    dice: Dice,
    tally: Arc<Tally>,
}

impl Link {
    fn mode(&self) -> Mode {
        *self.modes.borrow()
    }

    /// Returns once the mode is one that `wanted` accepts.
    async fn until(&self, wanted: impl Fn(Mode) -> bool) {
        let mut modes = self.modes.clone();
        if modes.wait_for(|mode| wanted(*mode)).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// A sequence that follows from its seed (`SplitMix64`), shared by all connections of a link.
#[derive(Debug, Clone)]
struct Dice(Arc<AtomicU64>);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(Arc::new(AtomicU64::new(seed)))
    }

    fn hits(&self, per_cent: u64) -> bool {
        let before = self.0.fetch_add(Rng::STEP, Ordering::Relaxed);
        Rng(before).number() % 100 < per_cent
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

enum Accepted {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Accepts until the task is dropped; while the link is cut nobody listens.
async fn serve(near: Address, link: Link, first: Listener) {
    let mut listener = Some(first);
    let mut connections = JoinSet::new();
    loop {
        let Some(open) = &listener else {
            link.until(|mode| mode != Mode::Cut).await;
            listener = bind(&near).await;
            continue;
        };
        tokio::select! {
            () = link.until(|mode| mode == Mode::Cut) => {
                listener = None;
                if let Address::Unix(path) = &near {
                    let _ = std::fs::remove_file(path);
                }
            }
            accepted = accept(open) => match accepted {
                Ok(Accepted::Tcp(near)) => drop(connections.spawn(connection(near, link.clone()))),
                Ok(Accepted::Unix(near)) => drop(connections.spawn(connection(near, link.clone()))),
                Err(error) => println!("proxy: {error}"),
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn bind(near: &Address) -> Option<Listener> {
    match near {
        Address::Tcp(port) => TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).await.ok().map(Listener::Tcp),
        Address::Unix(path) => UnixListener::bind(path).ok().map(Listener::Unix),
    }
}

async fn accept(listener: &Listener) -> io::Result<Accepted> {
    match listener {
        Listener::Tcp(listener) => listener.accept().await.map(|(near, _)| Accepted::Tcp(near)),
        Listener::Unix(listener) => listener.accept().await.map(|(near, _)| Accepted::Unix(near)),
    }
}

/// A kind of socket.
trait Wire: AsyncRead + AsyncWrite + Unpin + Send + Sized + 'static {
    fn connect(to: &Address) -> impl Future<Output = io::Result<Self>> + Send;
    /// Closes so that the peer sees an error, if this kind of socket knows how.
    fn abort(self);
}

impl Wire for TcpStream {
    async fn connect(to: &Address) -> io::Result<Self> {
        let Address::Tcp(port) = to else { return Err(io::ErrorKind::Unsupported.into()) };
        let stream = Self::connect((Ipv4Addr::LOCALHOST, *port)).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    fn abort(self) {
        let _ = self.set_zero_linger();
    }
}

impl Wire for UnixStream {
    async fn connect(to: &Address) -> io::Result<Self> {
        let Address::Unix(path) = to else { return Err(io::ErrorKind::Unsupported.into()) };
        Self::connect(path).await
    }

    fn abort(self) {}
}

async fn connection<W: Wire>(mut near: W, link: Link) {
    link.tally.connections.fetch_add(1, Ordering::Relaxed);
    link.until(|mode| mode != Mode::Blackhole).await;
    let Ok(mut far) = <W as Wire>::connect(&link.to).await else { return near.abort() };
    let ended_well = {
        let (near_read, near_write) = tokio::io::split(&mut near);
        let (far_read, far_write) = tokio::io::split(&mut far);
        let both =
            async { tokio::try_join!(pump(near_read, far_write, &link), pump(far_read, near_write, &link)) };
        tokio::select! {
            () = link.until(|mode| mode == Mode::Cut) => false,
            both = both => both.is_ok(),
        }
    };
    if !ended_well {
        link.tally.resets.fetch_add(1, Ordering::Relaxed);
        near.abort();
        far.abort();
    }
}

/// Moves one direction until its end, which it passes on.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    link: &Link,
) -> io::Result<()> {
    let (sender, mut chunks) = mpsc::channel::<(Instant, Vec<u8>)>(CHUNKS);
    let read = async move {
        loop {
            link.until(|mode| mode != Mode::Blackhole).await;
            let mut chunk = vec![0; CHUNK_BYTES];
            let length = from.read(&mut chunk).await?;
            if length == 0 {
                return Ok(());
            }
            chunk.truncate(length);
            let delay = match link.mode() {
                Mode::Reset(per_cent) if link.dice.hits(per_cent) => {
                    return Err(io::ErrorKind::ConnectionReset.into());
                }
                Mode::Delay(delay) => delay,
                _ => Duration::ZERO,
            };
            if sender.send((Instant::now() + delay, chunk)).await.is_err() {
                return Ok(());
            }
        }
    };
    let write = async {
        while let Some((due, chunk)) = chunks.recv().await {
            sleep_until(due).await;
            link.until(|mode| mode != Mode::Blackhole).await;
            to.write_all(&chunk).await?;
            link.tally.chunks.fetch_add(1, Ordering::Relaxed);
        }
        to.shutdown().await
    };
    tokio::try_join!(read, write).map(|((), ())| ())
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    const SHORT: Duration = Duration::from_millis(150);

    /// A server that sends back what it gets.
    async fn echo() -> u16 {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.split();
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                });
            }
        });
        port
    }

    async fn dial(proxy: &Proxy) -> io::Result<TcpStream> {
        TcpStream::connect((Ipv4Addr::LOCALHOST, proxy.port())).await
    }

    async fn there_and_back(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<Vec<u8>> {
        stream.write_all(bytes).await?;
        let mut answer = vec![0; bytes.len()];
        stream.read_exact(&mut answer).await?;
        Ok(answer)
    }

    #[tokio::test]
    async fn every_mode_does_what_it_says_and_passing_comes_back() {
        let proxy = Proxy::tcp(echo().await).await.unwrap();
        let mut stream = dial(&proxy).await.unwrap();
        let bytes: Vec<u8> = (0..300_000_u32).map(|n| n as u8).collect();
        let (mut read, mut write) = dial(&proxy).await.unwrap().into_split();
        let sent = bytes.clone();
        tokio::spawn(async move { write.write_all(&sent).await });
        let mut back = vec![0; bytes.len()];
        read.read_exact(&mut back).await.unwrap();
        assert_eq!(back, bytes);

        proxy.set(Mode::Delay(SHORT));
        let begun = Instant::now();
        assert_eq!(there_and_back(&mut stream, b"late").await.unwrap(), b"late");
        assert!(begun.elapsed() >= 2 * SHORT, "{:?}", begun.elapsed());

        proxy.set(Mode::Blackhole);
        let mut patient = dial(&proxy).await.unwrap();
        assert!(timeout(SHORT, there_and_back(&mut stream, b"held")).await.is_err());
        assert!(timeout(SHORT, there_and_back(&mut patient, b"new")).await.is_err());
        proxy.set(Mode::Pass);
        let mut held = [0; 4];
        stream.read_exact(&mut held).await.unwrap();
        assert_eq!(&held, b"held");

        proxy.set(Mode::Cut);
        let cut = stream.read(&mut held).await;
        assert_eq!(cut.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        let refused = async {
            while dial(&proxy).await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(5), refused).await.unwrap();
        proxy.set(Mode::Pass);
        let again = async {
            loop {
                if let Ok(stream) = dial(&proxy).await {
                    break stream;
                }
                tokio::task::yield_now().await;
            }
        };
        let mut stream = timeout(Duration::from_secs(5), again).await.unwrap();
        assert_eq!(there_and_back(&mut stream, b"back").await.unwrap(), b"back");

        proxy.set(Mode::Reset(100));
        let reset = there_and_back(&mut stream, b"lost").await;
        assert_eq!(reset.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert!(proxy.resets() >= 2);
    }

    #[test]
    fn the_dice_are_fair_and_follow_from_the_seed() {
        let throw = |seed| {
            let dice = Dice::new(seed);
            (0..10_000).map(|_| dice.hits(5)).collect::<Vec<_>>()
        };
        assert_eq!(throw(1), throw(1));
        assert_ne!(throw(1), throw(2));
        let hits = throw(1).into_iter().filter(|hit| *hit).count();
        assert!((400..600).contains(&hits), "{hits}");
    }
}
