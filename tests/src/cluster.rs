//! A cluster of brokers on the loopback address, with a proxy on every route between two of them.

use std::time::Duration;

use anyhow::{Context as _, Result};
use async_nats::jetstream::{
    self, consumer,
    stream::{ClusterInfo, Config, PeerInfo, StorageType},
};
use dermflow_local::{
    nats::{ADMIN, Member, Nats, Settings},
    ports,
    stack::Stack,
};
use dermflow_schemas::queue;
use futures_util::{TryStreamExt, future::try_join_all};

use crate::{
    chaos::{Mode, Proxy},
    wait::eventually,
};

const READY_WITHIN: Duration = Duration::from_mins(1);

/// The servers of a cluster beyond the first one, which is the stack's own, and the routes among all.
#[derive(Debug, Default)]
pub struct Cluster {
    ports: Vec<u16>,
    /// From, to, and what is in between.
    routes: Vec<(usize, usize, Proxy)>,
    peers: Vec<Nats>,
}

impl Cluster {
    /// Ports and routes for `nodes` servers; nothing runs yet.
    ///
    /// # Errors
    /// When no port is free.
    pub async fn plan(nodes: usize) -> Result<Self> {
        if nodes < 2 {
            return Ok(Self::default());
        }
        let ports: Vec<u16> = (0..nodes).map(|_| ports::free()).collect::<Result<_>>()?;
        let mut routes = Vec::new();
        for from in 0..nodes {
            for to in (0..nodes).filter(|to| *to != from) {
                routes.push((from, to, Proxy::tcp(ports[to]).await?));
            }
        }
        Ok(Self { ports, routes, peers: Vec::new() })
    }

    /// The part of server `n`; `None` when there is no cluster.
    pub fn member(&self, n: usize) -> Option<Member> {
        let port = *self.ports.get(n)?;
        let routes = self.routes.iter().filter(|(from, ..)| *from == n).map(|(.., proxy)| proxy.port());
        Some(Member { number: n + 1, port, routes: routes.collect() })
    }

    /// Writes the configuration of the other servers.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn prepare(&mut self, stack: &Stack, server: &std::path::Path, settings: &Settings) -> Result<()> {
        for n in 1..self.ports.len() {
            let settings = Settings { member: self.member(n), ..settings.clone() };
            self.peers.push(Nats::prepare(&stack.state, &stack.pki, server, &settings)?);
        }
        Ok(())
    }

    /// Starts the other servers, and waits until each of them answers.
    ///
    /// # Errors
    /// When one does not.
    pub async fn start(&mut self) -> Result<()> {
        try_join_all(self.peers.iter_mut().map(Nats::start)).await?;
        Ok(())
    }

    /// Waits until a stream can be placed on all servers.
    ///
    /// # Errors
    /// When it cannot within a minute.
    pub async fn until_placed(&self, first: &Nats) -> Result<()> {
        let context = jetstream::new(first.connect(ADMIN.user).await?);
        let probe = Config {
            name: "PROBE".into(),
            subjects: vec!["probe".into()],
            num_replicas: self.ports.len(),
            storage: StorageType::Memory,
            ..Config::default()
        };
        let placed = async || context.create_stream(probe.clone()).await.ok().map(drop);
        eventually("a stream is on every server", READY_WITHIN, placed).await?;
        context.delete_stream("PROBE").await.context("cannot delete the probe")?;
        Ok(())
    }

    /// The other servers.
    pub fn peers(&self) -> &[Nats] {
        &self.peers
    }

    /// The other servers.
    pub fn peers_mut(&mut self) -> &mut [Nats] {
        &mut self.peers
    }

    /// Cuts server `n` off from all others: their connections stand still, and new ones do nothing.
    pub fn isolate(&self, n: usize) {
        for (from, to, proxy) in &self.routes {
            if *from == n || *to == n {
                proxy.set(Mode::Blackhole);
            }
        }
    }

    /// Brings every route back.
    pub fn heal(&self) {
        for (.., proxy) in &self.routes {
            proxy.set(Mode::Pass);
        }
    }

    /// Stops the other servers, in order.
    ///
    /// # Errors
    /// When one had to be killed.
    pub async fn stop(&mut self) -> Result<()> {
        let mut outcome = Ok(());
        for peer in &mut self.peers {
            outcome = outcome.and(peer.stop().await);
        }
        outcome
    }
}

/// The number of the server that leads the stream of jobs, as `at` sees it.
///
/// # Errors
/// When there is none, or nobody answers.
pub async fn leader(at: &Nats) -> Result<usize> {
    let context = jetstream::new(at.connect(ADMIN.user).await?);
    let info = context.get_stream(queue::JOBS).await?.cached_info().clone();
    let name = info.cluster.and_then(|cluster| cluster.leader).context("nobody leads")?;
    let number: usize = name.rsplit('-').next().unwrap_or_default().parse()?;
    Ok(number - 1)
}

/// Whether every stream and every consumer has a leader, and all copies are up to date.
///
/// # Errors
/// When nobody answers.
pub async fn in_step(context: &jetstream::Context) -> Result<bool> {
    let complete = |cluster: &Option<ClusterInfo>| {
        cluster.as_ref().is_some_and(|cluster| {
            let copy = |replica: &PeerInfo| replica.current && !replica.active.is_zero();
            cluster.leader.is_some() && cluster.replicas.iter().all(copy)
        })
    };
    let names: Vec<String> = context.stream_names().try_collect().await?;
    for name in names {
        let stream = context.get_stream(name).await?;
        let consumers: Vec<consumer::Info> = stream.consumers().try_collect().await?;
        if !complete(&stream.cached_info().cluster) || !consumers.iter().all(|info| complete(&info.cluster)) {
            return Ok(false);
        }
    }
    Ok(true)
}
