//! Decoding in a process of its own, one an executor: a decoder that crashes, or takes too much memory or time, costs the
//! image that it had in hand and nothing else.
//!
//! The worker starts its own program again as `worker decode-child`, at once, and keeps it. They talk over a socket: a file
//! goes in, a [`Frame`] or a reason comes out, so that the worker never has a whole image in its memory. The child may open
//! no file and no connection, and has [`limits::DECODER_ADDRESS_SPACE`] for itself. One that dies is replaced, and the image
//! tried once more, as somebody may have killed an innocent one; then the attempt at its job is given up.

use std::{
    cell::RefCell,
    env,
    io::{self, ErrorKind, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    panic,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use dermflow_schemas::{
    image::{Format, header},
    limits,
};
use image::RgbImage;
use rustix::{
    process::{Resource, Rlimit, Signal, set_parent_process_death_signal, setrlimit},
    thread::set_no_new_privs,
};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    decode::{DecodeError, Picture},
    frame::Frame,
    memory,
    model::MAX_INPUT_SIDE,
};

/// The argument that makes a worker's program a decoder.
pub const ARGUMENT: &str = "decode-child";
/// The running program, even when its file was replaced or is gone.
pub const OWN_PROGRAM: &str = "/proc/self/exe";
/// What a decoder gets of its worker's environment, which may hold secrets.
const ENVIRONMENT: [&str; 2] = ["RUST_LOG", "LD_LIBRARY_PATH"];
/// What a child says once its limits are set.
const READY: [u8; 1] = [1];

/// Where the threads of executors decode.
#[derive(Debug, Clone)]
pub enum Decoding {
    /// On the thread itself.
    Here,
    /// In a child of this program, one a thread.
    InChild(PathBuf),
}

impl Decoding {
    /// From now on this thread decodes like that. A child is started now, and has answered.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn enter(&self) -> io::Result<()> {
        let Self::InChild(program) = self else { return Ok(()) };
        let mut decoder = Decoder { program: program.clone(), running: None };
        decoder.running = Some(decoder.start(Instant::now() + limits::DECODE_DEADLINE)?);
        DECODER.set(Some(decoder));
        Ok(())
    }
}

thread_local! {
    static DECODER: RefCell<Option<Decoder>> = const { RefCell::new(None) };
}

/// Decodes in this thread's child for a model with such an `input`, by `deadline`; `None` when it has none.
pub(crate) fn decode(
    file: &[u8],
    format: Format,
    input: (u32, u32),
    deadline: Instant,
) -> Option<Result<Frame, DecodeError>> {
    let task = Task { file, format, input };
    DECODER.with_borrow_mut(|decoder| decoder.as_mut().map(|decoder| decoder.decode(task, deadline)))
}

/// What a child is asked for.
#[derive(Clone, Copy)]
struct Task<'a> {
    file: &'a [u8],
    format: Format,
    input: (u32, u32),
}

#[derive(Debug)]
struct Decoder {
    program: PathBuf,
    /// `None` after it has died.
    running: Option<Running>,
}

impl Decoder {
    fn decode(&mut self, task: Task<'_>, deadline: Instant) -> Result<Frame, DecodeError> {
        let mut again = true;
        loop {
            // Out of its place: what ends here before its time, by whatever way, leaves nobody with half an answer.
            let mut running = match self.running.take() {
                Some(running) => running,
                None => self.start(deadline).map_err(|error| {
                    tracing::error!(%error, "no decoder");
                    thread::sleep(limits::DECODER_PAUSE);
                    DecodeError::NotStarted(error.to_string())
                })?,
            };
            let error = match running.ask(task, deadline) {
                Ok(answer) => {
                    self.running = Some(running);
                    return answer;
                }
                Err(error) => error,
            };
            if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) {
                tracing::warn!("a decoder did not finish; another takes its place");
                return Err(DecodeError::Slow);
            }
            let end = running.end();
            tracing::warn!(end, "a decoder has died; another takes its place");
            if !again {
                return Err(DecodeError::Died(end));
            }
            again = false;
        }
    }

    /// A child that has set its limits.
    ///
    /// # Errors
    /// When there is none by `deadline`.
    fn start(&self, deadline: Instant) -> io::Result<Running> {
        let (socket, other) = UnixStream::pair()?;
        let process = Command::new(&self.program)
            .arg(ARGUMENT)
            .env_clear()
            .envs(ENVIRONMENT.iter().filter_map(|name| Some((name, env::var_os(name)?))))
            .stdin(OwnedFd::from(other))
            .stdout(Stdio::null())
            // Ctrl-C is for the worker, who then ends what it works on.
            .process_group(0)
            .spawn()?;
        let running = Running { process, socket };
        let mut said = [0];
        Timed { socket: &running.socket, deadline }.read_exact(&mut said)?;
        if said == READY { Ok(running) } else { Err(ErrorKind::InvalidData.into()) }
    }
}

#[derive(Debug)]
struct Running {
    process: Child,
    socket: UnixStream,
}

impl Running {
    /// What came of a file.
    ///
    /// # Errors
    /// When the child has died, or does not finish by `deadline`.
    fn ask(&mut self, task: Task<'_>, deadline: Instant) -> io::Result<Result<Frame, DecodeError>> {
        let Task { file, format, input } = task;
        let mut wire = Timed { socket: &self.socket, deadline };
        let length = u32::try_from(file.len()).map_err(io::Error::other)?;
        wire.write_all(&[u8::from(format == Format::Png)])?;
        wire.write_all(&numbers([input.0, input.1, length]))?;
        wire.write_all(file)?;
        let [width, height] = [number(&mut wire)?, number(&mut wire)?];
        if height == 0 {
            let mut reason = vec![0; (width as usize).min(MAX_REASON)];
            wire.read_exact(&mut reason)?;
            return Ok(Err(DecodeError::Told(String::from_utf8_lossy(&reason).into_owned())));
        }
        let sizes = limits::MIN_SIDE_PIXELS..=limits::MAX_SIDE_PIXELS;
        if !sizes.contains(&width) || !sizes.contains(&height) {
            return Err(ErrorKind::InvalidData.into());
        }
        let squashed = pixels(&mut wire, input)?;
        let thumbnail = pixels(&mut wire, Frame::thumbnail_size(width, height))?;
        Ok(Ok(Frame { width, height, squashed, thumbnail }))
    }

    /// How it ended, once it has.
    fn end(mut self) -> String {
        let _ = self.process.kill();
        self.process.wait().map_or_else(|error| error.to_string(), |status| status.to_string())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Bytes of the reason for which a file does not decode.
const MAX_REASON: usize = 1_024;

fn numbers<const N: usize>(numbers: [u32; N]) -> Vec<u8> {
    numbers.into_iter().flat_map(u32::to_le_bytes).collect()
}

fn pixels(wire: &mut impl Read, (width, height): (u32, u32)) -> io::Result<RgbImage> {
    let mut image = RgbImage::new(width, height);
    wire.read_exact(&mut image)?;
    Ok(image)
}

fn number(wire: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    wire.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

/// A socket with one deadline for all that is read and written.
struct Timed<'a> {
    socket: &'a UnixStream,
    deadline: Instant,
}

impl Timed<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.left()?)?;
        self.socket.read(buffer)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

/// The life of a child: files come in on standard input, which is a socket, until there are no more.
///
/// # Errors
/// When a limit cannot be set, or the worker is gone.
pub fn serve() -> io::Result<()> {
    // It ends with its worker, and no sooner: who stops a service sends SIGTERM to its children as well.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let context = runtime.enter();
    let ignored = [signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?];
    set_parent_process_death_signal(Some(Signal::KILL))?;
    set_no_new_privs(true)?;
    let mut socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let limits = [(Resource::As, limits::DECODER_ADDRESS_SPACE), (Resource::Nofile, 0), (Resource::Core, 0)];
    for (resource, most) in limits {
        setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })?;
    }
    socket.write_all(&READY)?;
    let mut format = [0];
    while socket.read(&mut format)? == 1 {
        let [columns, rows, length] = [number(&mut socket)?, number(&mut socket)?, number(&mut socket)?];
        if columns.max(rows) > MAX_INPUT_SIDE || length as usize > limits::MAX_IMAGE_BYTES {
            return Err(ErrorKind::InvalidData.into());
        }
        let mut file = vec![0; length as usize];
        socket.read_exact(&mut file)?;
        let format = if format == [1] { Format::Png } else { Format::Jpeg };
        if header(&file, format).is_some_and(|header| header.memory <= memory::ORDINARY) {
            memory::keep_much();
        } else {
            memory::keep_little();
        }
        // A library that panics over a file does so again.
        let frame = panic::catch_unwind(|| Ok(Frame::of(&Picture::decode(file, format)?, (columns, rows))))
            .unwrap_or_else(|_| Err(DecodeError::Told("its decoder panicked".into())));
        answer(&mut socket, frame)?;
    }
    drop((ignored, context));
    Ok(())
}

/// Columns and rows as displayed, and the pixels of both images; or bytes of the reason, 0 and the reason.
fn answer(socket: &mut UnixStream, decoded: Result<Frame, DecodeError>) -> io::Result<()> {
    match decoded {
        Ok(Frame { width, height, squashed, thumbnail }) => {
            socket.write_all(&numbers([width, height]))?;
            socket.write_all(squashed.as_raw())?;
            socket.write_all(thumbnail.as_raw())
        }
        Err(error) => {
            let reason = error.to_string();
            let reason = &reason.as_bytes()[..reason.len().min(MAX_REASON)];
            socket.write_all(&numbers([reason.len() as u32, 0]))?;
            socket.write_all(reason)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No program, and one that is no decoder: no start, and nothing is said of the image.
    #[test]
    fn a_decoder_that_cannot_be_started_is_not_the_fault_of_an_image() {
        for program in ["/nowhere/worker", "/bin/true"] {
            let decoding = Decoding::InChild(program.into());
            assert!(decoding.enter().is_err(), "{program}");
            let mut decoder = Decoder { program: program.into(), running: None };
            let deadline = Instant::now() + limits::DECODE_DEADLINE;
            let task = Task { file: b"", format: Format::Png, input: (1, 1) };
            let answer = decoder.decode(task, deadline);
            assert!(matches!(answer, Err(DecodeError::NotStarted(_))), "{program}: {answer:?}");
        }
    }
}
