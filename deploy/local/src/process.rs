//! A child process: described once, started as often as needed, never left behind.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::{
        fs::PermissionsExt,
        process::{CommandExt, ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{LazyLock, mpsc},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
pub use rustix::process::Signal;
use rustix::process::{
    Pid, Resource, Rlimit, WaitId, WaitIdOptions, getrlimit, kill_process, setrlimit, waitid,
};
use tokio::{
    net::UnixDatagram,
    time::{Instant, sleep, timeout},
};

use crate::{state::private_file, unprivileged::User};

/// How often a condition is looked at while it is waited for.
pub(crate) const TICK: Duration = Duration::from_millis(20);
/// A log longer than this is begun anew at the next start.
const MAX_LOG_BYTES: u64 = 32 << 20;
/// How much of a log's end is read to quote its last line.
const TAIL_BYTES: u64 = 8 << 10;

/// A program with its arguments, and its process while there is one.
///
/// Its output goes to a private log file. It is killed when this value is dropped and, on Linux, by the kernel
/// when the process that started it ends in any way.
#[derive(Debug)]
pub struct Process {
    name: String,
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(String, String)>,
    user: Option<User>,
    log: PathBuf,
    log_start: u64,
    child: Option<Child>,
}

impl Process {
    /// Describes a process; `name` is what messages call it.
    pub fn new(name: impl Into<String>, program: impl Into<PathBuf>, log: impl Into<PathBuf>) -> Self {
        let (name, program, log) = (name.into(), program.into(), log.into());
        Self { name, program, args: Vec::new(), env: Vec::new(), user: None, log, log_start: 0, child: None }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.add_args(args);
        self
    }

    /// Adds arguments for the next start.
    pub fn add_args<A: Into<OsString>>(&mut self, args: impl IntoIterator<Item = A>) {
        self.args.extend(args.into_iter().map(Into::into));
    }

    /// Sets an environment variable for the next start.
    pub fn set_env(&mut self, name: &str, value: &str) {
        self.env.push((name.into(), value.into()));
    }

    /// Runs it as another user (this process must be root), with no further groups.
    #[must_use]
    pub fn user(mut self, user: Option<User>) -> Self {
        self.user = user;
        self
    }

    /// From its next start on it sees the files that the process `holder` sees, in a user and a mount namespace of that
    /// one's own (nsenter(1)).
    pub fn see_files_of(&mut self, holder: u32) {
        let program = std::mem::replace(&mut self.program, "nsenter".into());
        let target = format!("--target={holder}");
        let enter = [&target, "--user", "--mount", "--preserve-credentials", "--"].map(OsString::from);
        self.args.splice(0..0, enter.into_iter().chain([program.into_os_string()]));
    }

    /// What messages call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its output goes.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Its process id while it runs.
    pub fn id(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    fn pid(&self) -> Option<Pid> {
        self.id().and_then(|id| Pid::from_raw(id.cast_signed()))
    }

    /// Starts it.
    ///
    /// # Errors
    /// When it runs already, or cannot be started.
    pub fn spawn(&mut self) -> Result<()> {
        self.spawn_with(None)
    }

    /// Starts it, and returns once it has sent `READY=1` (`sd_notify(3)`).
    ///
    /// # Errors
    /// When it cannot be started; when it ends or `within` passes first (then it is killed, and the error
    /// quotes the last line of its log).
    pub async fn spawn_ready(&mut self, within: Duration) -> Result<()> {
        let path = std::env::temp_dir().join(format!("dermflow-{}.notify", uuid::Uuid::new_v4().simple()));
        let socket = UnixDatagram::bind(&path)
            .with_context(|| format!("cannot listen for the readiness of {}", self.name))?;
        let outcome = async {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
            self.spawn_with(Some(&path))?;
            self.until_ready(&socket, within).await
        };
        let outcome = outcome.await;
        let _ = fs::remove_file(&path);
        if outcome.is_err() {
            self.kill().await;
        }
        outcome
    }

    async fn until_ready(&mut self, socket: &UnixDatagram, within: Duration) -> Result<()> {
        let deadline = Instant::now() + within;
        let mut message = [0; 4096];
        loop {
            if let Ok(received) = timeout(TICK, socket.recv(&mut message)).await {
                let length = received.context("cannot hear from the process")?;
                if message[..length].split(|byte| *byte == b'\n').any(|line| line == b"READY=1") {
                    return Ok(());
                }
            }
            self.still_starting(deadline)?;
        }
    }

    /// An error once the process has ended, or `deadline` has passed.
    pub(crate) fn still_starting(&mut self, deadline: Instant) -> Result<()> {
        if let Some(status) = self.exited() {
            bail!("{} ended at its start ({}): {}", self.name, describe(status), self.last_line());
        }
        if Instant::now() > deadline {
            bail!("{} did not become ready in time: {}", self.name, self.last_line());
        }
        Ok(())
    }

    fn spawn_with(&mut self, notify: Option<&Path>) -> Result<()> {
        if self.exited().is_none() && self.child.is_some() {
            bail!("{} runs already", self.name);
        }
        let log = self.open_log().with_context(|| format!("cannot write the log {}", self.log.display()))?;
        let mut command = Command::new(&self.program);
        command
            .args(&self.args)
            .envs(self.env.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        raise_descriptors();
        // Its own process group: Ctrl-C is for us, who then stop things in order.
        command.process_group(0).env_remove("NOTIFY_SOCKET");
        if let Some(path) = notify {
            command.env("NOTIFY_SOCKET", path);
        }
        if let Some(user) = self.user {
            // The folder that we are in may be closed to that user.
            command.uid(user.uid).gid(user.gid).current_dir("/");
        }
        let child = spawn_bound(command)
            .with_context(|| format!("cannot start {} ({})", self.name, self.program.display()))?;
        self.child = Some(child);
        Ok(())
    }

    fn open_log(&mut self) -> io::Result<File> {
        let mut log = private_file(OpenOptions::new().create(true).append(true), &self.log)?;
        if log.metadata()?.len() > MAX_LOG_BYTES {
            log.set_len(0)?;
        }
        self.log_start = log.seek(SeekFrom::End(0))?;
        Ok(log)
    }

    /// How it ended, if it has been started and has ended.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.as_mut().and_then(|child| child.try_wait().ok().flatten())
    }

    /// Whether it runs (a paused process does).
    pub fn is_running(&mut self) -> bool {
        self.child.is_some() && self.exited().is_none()
    }

    /// Sends a signal; does nothing when the process has ended.
    pub fn signal(&mut self, signal: Signal) {
        // A process that was not waited for yet keeps its id, so the signal cannot reach another one.
        if self.is_running()
            && let Some(pid) = self.pid()
        {
            let _ = kill_process(pid, signal);
        }
    }

    /// Freezes it: SIGSTOP. Returns once every thread of it stands still.
    pub fn pause(&mut self) {
        self.signal(Signal::STOP);
        if self.is_running()
            && let Some(pid) = self.pid()
        {
            // Only looks (`NOWAIT`): the end of the process stays to be seen by `exited`.
            let end_or_stop = WaitIdOptions::EXITED | WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT;
            let _ = waitid(WaitId::Pid(pid), end_or_stop);
        }
    }

    /// Lets it go on after [`Process::pause`]: SIGCONT.
    pub fn resume(&mut self) {
        self.signal(Signal::CONT);
    }

    /// Kills it: SIGKILL. Returns once it is gone.
    pub async fn kill(&mut self) {
        self.signal(Signal::KILL);
        while self.is_running() {
            sleep(TICK).await;
        }
        self.child = None;
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it was never started, or still runs after `within`.
    pub async fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + within;
        while self.child.is_some() {
            if let Some(status) = self.exited() {
                self.child = None;
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} still runs after {} s", self.name, within.as_secs());
            }
            sleep(TICK).await;
        }
        bail!("{} was not started", self.name)
    }

    /// Asks it to end with `signal` and waits; kills it when it still runs after `grace`. Does nothing when it
    /// does not run.
    ///
    /// # Errors
    /// When it had to be killed.
    pub async fn stop(&mut self, signal: Signal, grace: Duration) -> Result<()> {
        if self.is_running() {
            self.signal(signal);
            self.resume();
            if let Err(late) = self.wait(grace).await {
                self.kill().await;
                return Err(late.context(format!("{} had to be killed", self.name)));
            }
        }
        self.child = None;
        Ok(())
    }

    /// The last line that it has written since its start, as text for a person.
    pub fn last_line(&self) -> String {
        let tail = || -> io::Result<String> {
            let mut file = File::open(&self.log)?;
            let from = file.metadata()?.len().saturating_sub(TAIL_BYTES).max(self.log_start);
            file.seek(SeekFrom::Start(from))?;
            let mut bytes = Vec::new();
            file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let tail = tail().unwrap_or_default();
        let Some(line) = tail.lines().rev().find(|line| !line.trim().is_empty()) else {
            return "it wrote nothing".into();
        };
        let structured: Option<serde_json::Value> = serde_json::from_str(line).ok();
        let message = structured.as_ref().and_then(|line| line["message"].as_str());
        message.unwrap_or(line).trim().to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// An exit status in words.
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown cause".into(),
    }
}

/// Lets this process and those that it starts have as many descriptors as the system allows: the usual 1,024 are fewer
/// than the connections that ingress takes.
fn raise_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    // Who may not have more goes on with what there is.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// Starts a command whose process the kernel kills when this process ends.
///
/// The kernel watches the *thread* that started it: so one thread, which lives as long as we do, starts all.
fn spawn_bound(mut command: Command) -> io::Result<Child> {
    type Order = (Command, mpsc::SyncSender<io::Result<Child>>);
    static STARTER: LazyLock<mpsc::Sender<Order>> = LazyLock::new(|| {
        let (sender, orders) = mpsc::channel::<Order>();
        thread::spawn(move || {
            for (mut command, reply) in orders {
                let _ = reply.send(command.spawn());
            }
        });
        sender
    });
    die_with_parent(&mut command);
    let (reply, answer) = mpsc::sync_channel(1);
    let gone = |_| io::Error::other("the thread that starts processes is gone");
    STARTER.send((command, reply)).map_err(|_| gone(mpsc::RecvError))?;
    answer.recv().map_err(gone)?
}

#[cfg(target_os = "linux")]
fn die_with_parent(command: &mut Command) {
    use rustix::process::{getpid, getppid, set_parent_process_death_signal};
    let parent = getpid();
    let arm = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // Had the parent ended before that, no signal would come.
        if getppid() == Some(parent) { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    };
    #[expect(unsafe_code, reason = "after fork, before exec: two system calls, no allocation, no lock")]
    // SAFETY: the closure only makes system calls that are safe after fork in a process with threads.
    unsafe {
        command.pre_exec(arm);
    }
}

#[cfg(not(target_os = "linux"))]
fn die_with_parent(_: &mut Command) {}

/// How soon a process that has ended unexpectedly is started again.
#[derive(Debug, Default)]
pub struct Backoff {
    recent: Vec<Instant>,
}

impl Backoff {
    /// How long to wait before the next start: half a second, then doubling up to 30 s while starts of the last
    /// five minutes pile up.
    pub fn pause(&mut self) -> Duration {
        let now = Instant::now();
        self.recent.retain(|start| now.duration_since(*start) < Duration::from_mins(5));
        self.recent.push(now);
        self.recent.truncate(16);
        let doublings = self.recent.len().saturating_sub(1).min(6) as u32;
        (Duration::from_millis(500) * 2_u32.pow(doublings)).min(Duration::from_secs(30))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Process {
        let log = std::env::temp_dir().join(format!("dermflow-test-{}.log", uuid::Uuid::new_v4()));
        Process::new("shell", "/bin/sh", log).args(["-c", script])
    }

    fn gone(pid: &str) -> bool {
        let state = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        state.is_empty() || state.contains(") Z ")
    }

    #[tokio::test]
    async fn readiness_is_heard_and_an_early_end_is_quoted() {
        let notify = "import os,socket; s=socket.socket(socket.AF_UNIX,socket.SOCK_DGRAM); \
             s.sendto(b'STATUS=up\\nREADY=1',os.environ['NOTIFY_SOCKET'])";
        let mut ready = shell(&format!("python3 -c \"{notify}\"; exec sleep 60"));
        ready.spawn_ready(Duration::from_secs(10)).await.unwrap();
        assert!(ready.is_running());
        assert_eq!(fs::metadata(ready.log()).unwrap().permissions().mode() & 0o777, 0o600);
        ready.stop(Signal::TERM, Duration::from_secs(5)).await.unwrap();
        assert!(!ready.is_running());

        let mut broken = shell("echo first; echo '{\"message\":\"no key\"}'; echo; exit 3");
        let error = broken.spawn_ready(Duration::from_secs(10)).await.unwrap_err().to_string();
        assert_eq!(error, "shell ended at its start (exit code 3): no key");

        let mut silent = shell("exec sleep 60");
        let error = silent.spawn_ready(Duration::from_millis(100)).await.unwrap_err().to_string();
        assert_eq!(error, "shell did not become ready in time: it wrote nothing");
        assert!(!silent.is_running());
        for process in [ready, broken, silent] {
            fs::remove_file(process.log()).unwrap();
        }
    }

    #[tokio::test]
    async fn what_does_not_stop_is_killed_even_when_paused() {
        let mut deaf = shell("trap '' TERM; echo up; while true; do sleep 0.05; done");
        deaf.spawn().unwrap();
        while deaf.last_line() != "up" {
            sleep(TICK).await;
        }
        deaf.pause();
        assert!(deaf.is_running());
        assert!(deaf.stop(Signal::TERM, Duration::from_millis(200)).await.is_err());
        assert!(!deaf.is_running());
        fs::remove_file(deaf.log()).unwrap();
    }

    /// The parent is this test's own program: it starts a child from a thread that ends at once, and waits.
    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_killed_parent_leaves_nothing_behind() {
        const LOG: &str = "DERMFLOW_TEST_CHILD_LOG";
        if let Some(log) = std::env::var_os(LOG) {
            let start = || {
                let mut child =
                    Process::new("child", "/bin/sh", log).args(["-c", "echo $$; exec sleep 1000"]);
                child.spawn().unwrap();
                child
            };
            let mut child = thread::spawn(start).join().unwrap();
            child.wait(Duration::from_hours(1)).await.unwrap();
        }
        let log = std::env::temp_dir().join(format!("dermflow-test-{}", uuid::Uuid::new_v4()));
        let mut parent = Process::new("parent", "/usr/bin/env", log.with_extension("log"))
            .arg(format!("{LOG}={}", log.display()))
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "process::tests::a_killed_parent_leaves_nothing_behind"]);
        parent.spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let pid = loop {
            match fs::read_to_string(&log) {
                Ok(pid) if pid.ends_with('\n') => break pid,
                _ => parent.still_starting(deadline).unwrap(),
            }
            sleep(TICK).await;
        };
        assert!(!gone(&pid));
        parent.kill().await;
        while !gone(&pid) {
            assert!(Instant::now() < deadline, "the child outlived its parent");
            sleep(TICK).await;
        }
        fs::remove_file(parent.log()).unwrap();
        fs::remove_file(log).unwrap();
    }

    #[test]
    fn restarts_begin_at_once_and_slow_down() {
        let mut backoff = Backoff::default();
        assert!(backoff.pause() < Duration::from_secs(2));
        let waits: Vec<_> = (0..20).map(|_| backoff.pause()).collect();
        assert!(waits.is_sorted());
        assert_eq!(waits.last(), Some(&Duration::from_secs(30)));
    }
}
