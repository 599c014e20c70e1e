//! Decoding in a process of its own, one an executor: a decoder that crashes, or takes too much memory or time, costs the
//! image that it had in hand and nothing else.
//!
//! The worker starts its own program again as `worker decode-child`, at once, and keeps it. They talk over a socket: a file
//! goes in, pixels or a reason come out. The child may open no file and no connection, and has
//! [`limits::DECODER_ADDRESS_SPACE`] for itself. One that dies is replaced, and the image tried once more, as somebody may
//! have killed an innocent one; then the attempt at its job is given up.

use std::{
    cell::RefCell,
    env,
    io::{self, ErrorKind, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use dermflow_schemas::{image::Format, limits};
use image::{RgbImage, metadata::Orientation};
use rustix::{
    process::{Resource, Rlimit, Signal, set_parent_process_death_signal, setrlimit},
    thread::set_no_new_privs,
};
use tokio::signal::unix::{SignalKind, signal};

use crate::decode::{DecodeError, Picture};

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

/// Decodes in this thread's child, by `deadline`; `None` when it has none.
pub(crate) fn decode(file: &[u8], format: Format, deadline: Instant) -> Option<Result<Picture, DecodeError>> {
    DECODER.with_borrow_mut(|decoder| decoder.as_mut().map(|decoder| decoder.decode(file, format, deadline)))
}

#[derive(Debug)]
struct Decoder {
    program: PathBuf,
    /// `None` after it has died.
    running: Option<Running>,
}

impl Decoder {
    fn decode(&mut self, file: &[u8], format: Format, deadline: Instant) -> Result<Picture, DecodeError> {
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
            let error = match running.ask(file, format, deadline) {
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
    fn ask(
        &mut self,
        file: &[u8],
        format: Format,
        deadline: Instant,
    ) -> io::Result<Result<Picture, DecodeError>> {
        let mut wire = Timed { socket: &self.socket, deadline };
        let length = u32::try_from(file.len()).map_err(io::Error::other)?;
        wire.write_all(&[u8::from(format == Format::Png)])?;
        wire.write_all(&length.to_le_bytes())?;
        wire.write_all(file)?;
        let [width, height, orientation] = [number(&mut wire)?, number(&mut wire)?, number(&mut wire)?];
        let turned = u8::try_from(orientation).ok().and_then(Orientation::from_exif);
        let area = u64::from(width) * u64::from(height);
        match turned {
            None => {
                let mut reason = vec![0; (width as usize).min(MAX_REASON)];
                wire.read_exact(&mut reason)?;
                Ok(Err(DecodeError::Told(String::from_utf8_lossy(&reason).into_owned())))
            }
            Some(_) if area > limits::MAX_PIXELS => Err(ErrorKind::InvalidData.into()),
            Some(orientation) => {
                let mut pixels = vec![0; area as usize * 3];
                wire.read_exact(&mut pixels)?;
                let pixels = RgbImage::from_raw(width, height, pixels).ok_or(ErrorKind::InvalidData)?;
                Ok(Ok(Picture::new(pixels, orientation)))
            }
        }
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
        let length = number(&mut socket)? as usize;
        if length > limits::MAX_IMAGE_BYTES {
            return Err(ErrorKind::InvalidData.into());
        }
        let mut file = vec![0; length];
        socket.read_exact(&mut file)?;
        let format = if format == [1] { Format::Png } else { Format::Jpeg };
        answer(&mut socket, Picture::decode_here(&file, format))?;
    }
    drop((ignored, context));
    Ok(())
}

/// Columns, rows, EXIF orientation and pixels; or bytes of the reason, 0, 0 and the reason.
fn answer(socket: &mut UnixStream, decoded: Result<Picture, DecodeError>) -> io::Result<()> {
    let mut head = Vec::with_capacity(12);
    let mut say = |numbers: [u32; 3]| head.extend(numbers.into_iter().flat_map(u32::to_le_bytes));
    match decoded {
        Ok(picture) => {
            let (pixels, orientation) = picture.into_parts();
            say([pixels.width(), pixels.height(), orientation.to_exif().into()]);
            socket.write_all(&head)?;
            socket.write_all(pixels.as_raw())
        }
        Err(error) => {
            let reason = error.to_string();
            let reason = &reason.as_bytes()[..reason.len().min(MAX_REASON)];
            say([reason.len() as u32, 0, 0]);
            socket.write_all(&head)?;
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
            let answer = decoder.decode(b"", Format::Png, deadline);
            assert!(matches!(answer, Err(DecodeError::NotStarted(_))), "{program}: {answer:?}");
        }
    }
}
